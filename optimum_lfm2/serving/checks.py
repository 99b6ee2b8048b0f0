"""What is wrong with the body of a request, in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving.utils import Modality

from optimum_lfm2.errors import Lfm2Error


# Fields beside OpenAI's that set what `generate` knows by the same name, and what each has to be.
OURS = {"top_k": (int, 0, 10**6), "min_p": (float, 0, 1), "repetition_penalty": (float, 1e-3, 100)}
RANGES = {
    "temperature": (float, 0, 100),
    "top_p": (float, 1e-6, 1),
    "frequency_penalty": (float, -0.999, 2),
    "seed": (int, 0, 2**63 - 1),
    "max_tokens": (int, 1, 2**31),
    "max_completion_tokens": (int, 1, 2**31),
    "max_output_tokens": (int, 1, 2**31),
    **OURS,
}


def check_range(name: str, value: Any) -> None:
    """Raise `Lfm2Error` for a number out of its range, and for what is none."""
    kind, least, most = RANGES[name]
    numbers = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, numbers) or not least <= value <= most:
        raise Lfm2Error(f"{name} is {str(value)[:60]}; it has to be a number from {least:g} to {most:g}.")


def check_biases(biases: Any) -> dict[str, float]:
    """Return the biases of tokens as floats, which transformers asks for. Raise `Lfm2Error` for what is none."""
    try:
        found = {str(int(token)): float(bias) for token, bias in biases.items()}
    except (AttributeError, TypeError, ValueError):
        found = None
    if found is None or not all(map(isfinite, found.values())):
        raise Lfm2Error('logit_bias has to be an object of numbers by tokens, such as {"7": -100}.')
    return found


def check_biased(biases: Mapping[str, float], size: int) -> None:
    """Raise `Lfm2Error` for a bias of a token beyond a vocabulary of this size."""
    if beyond := [token for token in biases if not 0 <= int(token) < size]:
        raise Lfm2Error(f"logit_bias has the token {beyond[0]}; this model's are 0 to {size - 1}.")


def check_stops(stop: Any) -> list[str]:
    """Return the stop strings. Raise `Lfm2Error` for what is none."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops) or len(stops) > 16:
        raise Lfm2Error("stop has to be a text, or a list of 16 texts at most.")
    return stops


def check_messages(messages: Any) -> None:
    """Raise `Lfm2Error` for what is no list of messages."""
    if not isinstance(messages, list) or not messages:
        raise Lfm2Error("messages has to be a list of messages.")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Lfm2Error("Each of messages has to be an object with a role.")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, (str, list, type(None))) or not all(_is_part(part) for part in parts):
            raise Lfm2Error(
                "The content of a message has to be a text, or a list of parts of the types text and image_url."
            )


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    return part.get("type") == "image_url"


def complete_calls(messages: list[Any]) -> None:
    """Give calls of earlier turns that have an empty text of arguments, as clients send for none, an empty object."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and function.get("arguments") in (None, ""):
                function["arguments"] = "{}"


def generation_settings(text: Any) -> dict[str, Any]:
    """Return the settings of `generate` that a request gives as a JSON text or as an object; none for None.

    Raises:
        Lfm2Error: it is neither, has what is no setting, or asks for several answers.
    """
    if text is None:
        return {}
    try:
        settings = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        settings = None
    if not isinstance(settings, Mapping):
        raise Lfm2Error('generation_config has to be a JSON object of settings of generate, such as {"num_beams": 3}.')
    known = GenerationConfig()
    if unknown := sorted(name for name in settings if not hasattr(known, name) or callable(getattr(known, name))):
        raise Lfm2Error(f"generation_config: {', '.join(unknown)} is no setting of generate. Leave it out.")
    for name in ("num_return_sequences", "return_dict_in_generate"):
        if settings.get(name) not in (None, False, 1) or settings.get(name) is True:
            raise Lfm2Error(f"generation_config: {name}: this server gives one answer of text. Leave it out.")
    return dict(settings)


def check_tools(tools: Any) -> None:
    """Raise `Lfm2Error` for what is no list of functions."""
    listed = tools if isinstance(tools, list) else [None]
    functions = [tool.get("function") if isinstance(tool, Mapping) else None for tool in listed]
    if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in functions):
        raise Lfm2Error('tools has to be a list of {"type": "function", "function": {"name": ...}}.')


def check_choice(body: dict) -> None:
    """Raise `Lfm2Error` for a `tool_choice` that names no tool. Without a choice of tools, leave them out."""
    choice = body.get("tool_choice", "auto")
    if choice == "none":
        body.pop("tools", None)
    elif choice != "auto":
        names = [name for name, _ in _functions(body)]
        if choice != "required" and _chosen(choice) not in names:
            raise Lfm2Error(
                'tool_choice has to be "auto", "none", "required", or {"type": "function", "function": {"name": ...}} '
                "with one of tools."
            )
        if not names:
            raise Lfm2Error('tool_choice is "required", and there are no tools. Give tools, or leave it out.')


def called_functions(body: dict) -> tuple[list[dict], bool] | None:
    """Return the functions of which one has to be called, and whether several calls may be made. None for no demand."""
    choice = body.get("tool_choice", "auto")
    if choice in ("auto", "none"):
        return None
    chosen = _chosen(choice)
    functions = [function for name, function in _functions(body) if chosen in (None, name)]
    return functions, chosen is None and body.get("parallel_tool_calls", True)


def _functions(body: dict) -> list[tuple[Any, dict]]:
    """Return the tools by name. Those of responses have no object around the function."""
    tools = body.get("tools")
    found = (
        [tool.get("function", tool) for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, list) else []
    )
    return [(one.get("name"), dict(one)) for one in found if isinstance(one, Mapping)]


def _chosen(choice: Any) -> Any:
    """Return the name of the one function that has to be called, or None."""
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def check_pictures(messages: list[dict], modality: Any) -> None:
    """Raise `Lfm2Error` for a picture by an address, since none is fetched, and for one that the model cannot see."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in ("image_url", "input_image"):
                continue
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str) or not url.startswith("data:image/"):
                raise Lfm2Error("A picture comes with the request, as data:image/png;base64,... None is fetched.")
            if modality == Modality.LLM:
                raise Lfm2Error("This model takes no pictures.")

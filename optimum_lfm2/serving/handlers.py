"""The handlers of transformers' server for our models: what a request may ask, and what each error becomes."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.serving.checks import (
    OURS,
    RANGES,
    called_functions,
    check_biased,
    check_biases,
    check_choice,
    check_messages,
    check_pictures,
    check_range,
    check_stops,
    check_tools,
    complete_calls,
    generation_settings,
)
from optimum_lfm2.serving.grammar_support import grammar_for
from optimum_lfm2.serving.manager import Extras, GoneError


# Fields that cannot be honoured, and the values by which they ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "audio": (),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "prediction": (),
    "web_search_options": (),
    "background": (False,),
    "previous_response_id": (),
    "prompt": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "text": ({"format": {"type": "text"}},),
}
PROMPTED = {"prompt"}  # which is a field of its own for completions
# What answers are parsed with where they are none of the template's: a processor without a template.
UNPARSED = SimpleNamespace(tokenizer=SimpleNamespace(response_template=None))
# The stop strings of the running request.
STOPS: ContextVar[list[str]] = ContextVar("stops")


@dataclass(frozen=True)
class Bounds:
    """What one request may ask for.

    Attributes:
        prompt: tokens of a prompt, or None.
        new: tokens of an answer.
    """

    prompt: int | None
    new: int


class ModelFailedError(RuntimeError):
    """What a model raised while it wrote."""


class Served(BaseHandler):
    """What our handlers share. It stands before transformers' own in each class.

    Args:
        bounds: what one request may ask for.
    """

    bounds: Bounds

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Answer a request as transformers' handler does.

        Raises:
            Lfm2Error: the request is wrong, or does not fit now.
            HTTPException: the model is not known.
            ModelFailedError: the model failed.
        """
        STOPS.set(check_stops(body.get("stop")))
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (HTTPException, Lfm2Error, ModelFailedError, GoneError, asyncio.CancelledError):
            raise
        except Exception as error:  # nothing has run yet: of the messages, the template or a picture
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise Lfm2Error(f"The request cannot be read ({what}).") from error

    def _validate_request(self, body: dict) -> None:
        known = set(getattr(self._valid_params_class, "__mutable_keys__", ())) | OURS.keys() | {"chat_template_kwargs"}
        if unknown := sorted(body.keys() - known):
            raise Lfm2Error(f"{', '.join(unknown)}: no such field. Leave it out.")
        for name, value in list(body.items()):
            if value is None:
                del body[name]
            elif name in RANGES:
                check_range(name, value)
            elif name in NOTHING and value not in NOTHING[name] and not (name in PROMPTED and self._reads_prompts):
                raise Lfm2Error(f"{name}: this server cannot honour it. Leave it out.")
        if not isinstance(body.get("stream", False), bool):
            raise Lfm2Error("stream has to be true or false.")
        if "logit_bias" in body:
            body["logit_bias"] = check_biases(body["logit_bias"])
        check_choice(body)

    _reads_prompts = False

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        return self.model_manager.resolve(body.get("model"))

    def _build_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False):
        # A seed would be one of the whole process, and transformers' own reading of settings forgets the model's.
        given = {name: value for name, value in body.items() if name not in ("seed", "generation_config")}
        settings = generation_settings(body.get("generation_config"))
        config: Any = copy.deepcopy(model_generation_config)
        for name, value in settings.items():
            setattr(config, name, value)
        config = super()._build_generation_config(given, config, use_cb=use_cb)
        asked = [body.get(name) for name in ("max_completion_tokens", "max_tokens", "max_output_tokens")]
        if all(one is None for one in asked):
            config.max_new_tokens = settings.get("max_new_tokens", config.max_new_tokens)
            config.max_new_tokens = min(config.max_new_tokens or self.bounds.new, self.bounds.new)
        elif config.max_new_tokens > self.bounds.new:
            raise Lfm2Error(
                f"The request asks for {config.max_new_tokens} tokens; this server writes {self.bounds.new}."
            )
        config.max_length = None
        if body.keys() & {"temperature", "top_p", "top_k", "min_p"}:
            config.do_sample = body.get("temperature") != 0
        for name in OURS.keys() & body.keys():
            setattr(config, name, body[name])
        if config.do_sample is False:
            config.temperature = config.top_p = config.top_k = config.min_p = None
        config.extras = Extras(seed=body.get("seed"))
        config.called, config.biased = called_functions(body), body.get("logit_bias", {})
        return config

    def _check_length(self, inputs: Any, config: Any, model: Any) -> None:
        """Refuse a prompt that is too long, and let the answer end within the model's positions."""
        length = inputs["input_ids"].shape[-1]
        most = model.config.get_text_config().max_position_embeddings
        allowed = min(most - 1, self.bounds.prompt or most)
        if length > allowed:
            raise Lfm2Error(f"The prompt has {length} tokens; {allowed} may be given. Shorten it.")
        config.max_new_tokens = min(config.max_new_tokens, most - length)

    def _streaming(self, request_id: str, model: Any, processor: Any, model_id: str, *args: Any, **kwargs: Any) -> Any:
        self._prepare(model, processor, args)
        response = super()._streaming(request_id, model, processor, model_id, *args, **kwargs)  # type: ignore[misc]
        if not self._ends_by_itself:
            response = StreamingResponse(_done_at_the_end(response.body_iterator), media_type="text/event-stream")
        return response

    _ends_by_itself = False  # or by "data: [DONE]"

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, model_id: str, *args: Any, **kwargs: Any
    ) -> Any:
        self._prepare(model, processor, args)
        places = [i for i, one in enumerate(args) if hasattr(one, "generate_non_streaming")]
        manager = args[places[0]] if places else kwargs["gen_manager"]
        inputs, config = self._inputs(args)
        try:
            result = await manager.generate_non_streaming(model, processor, inputs, config, request_id)
        except (Lfm2Error, GoneError, asyncio.CancelledError):
            raise
        except Exception as error:
            raise ModelFailedError(str(error)) from error
        done = _Done(result)
        if places:
            args = (*args[: places[0]], done, *args[places[0] + 1 :])
        else:
            kwargs["gen_manager"] = done
        try:
            return await super()._non_streaming(request_id, model, processor, model_id, *args, **kwargs)  # type: ignore[misc]
        except (ValueError, KeyError):  # a tool call that is none: its text is the answer
            return await super()._non_streaming(request_id, model, UNPARSED, model_id, *args, **kwargs)  # type: ignore[misc]

    def _inputs(self, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return the prompt and the settings among the arguments of `_streaming`."""
        place = next(i for i, one in enumerate(args) if isinstance(one, GenerationConfig))
        return args[place - 1], args[place]

    def _prepare(self, model: Any, processor: Any, args: tuple[Any, ...]) -> None:
        inputs, config = self._inputs(args)
        self._check_length(inputs, config, model)
        check_biased(config.__dict__.pop("biased", {}), model.config.get_text_config().vocab_size)
        form, called = (config.__dict__.pop(name, None) for name in ("response_format", "called"))
        tokenizer, width = getattr(processor, "tokenizer", processor), model.config.get_text_config().vocab_size
        config.extras.processors += grammar_for(tokenizer, width, inputs["input_ids"], form, called)


class _Done:
    """A manager whose request has ended."""

    def __init__(self, result: tuple[str, int, list[int]]) -> None:
        self._result = result

    async def generate_non_streaming(self, *_: Any, **__: Any) -> tuple[str, int, list[int]]:
        return self._result


async def _done_at_the_end(events: AsyncIterator[str]) -> AsyncIterator[str]:
    async with aclosing(events) as open_events:  # type: ignore[type-var]
        async for event in open_events:
            yield event
    yield "data: [DONE]\n\n"


class ServedChats(Served, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        check_messages(body.get("messages"))
        complete_calls(body["messages"])
        if body.get("tools") is not None:
            check_tools(body["tools"])

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Any) -> list[dict]:
        check_pictures(messages, modality)
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)

    def _build_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False):
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        config.response_format = body.get("response_format")
        return config

    def _build_completion(self, request_id: str, content: str, *args: Any, **kwargs: Any) -> dict:
        # A template parses the tokens, and so has the stop string too.
        places = [place for stop in STOPS.get() if (place := content.find(stop)) >= 0]
        return super()._build_completion(request_id, content[: min(places)] if places else content, *args, **kwargs)


class ServedCompletions(Served, CompletionHandler):
    """`/v1/completions`."""

    _reads_prompts = True

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        if not isinstance(body.get("prompt"), str) or not body["prompt"]:
            raise Lfm2Error("prompt has to be a text.")

    def _build_generation_config(self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False):
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("logit_bias"):  # transformers' own handler reads it in chats alone
            config.sequence_bias = {(int(token),): bias for token, bias in body["logit_bias"].items()}
        return config


class ServedResponses(Served, ResponseHandler):
    """`/v1/responses`."""

    _ends_by_itself = True

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        if not isinstance(body.get("input"), (str, list)) or not body["input"]:
            raise Lfm2Error("input has to be a text or a list of messages.")
        body.setdefault("stream", False)  # OpenAI's default; transformers' is True

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Any) -> list[dict]:
        check_pictures(messages, modality)
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)

"""A chat in the terminal: the cache stays between turns, and Ctrl-C ends an answer."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer, set_seed

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.serving.folder import Loaded, load_folder
from optimum_lfm2.serving.picture_files import read_picture


MAX_NEW_TOKENS = 1024
HELP = (
    "/reset begins a new chat, /save FILE writes it, /picture FILE shows a picture, /exit ends. Ctrl-C ends an answer."
)
# The settings of `generate` that a user gives: what they have to be, as a test and in words.
RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 1, "1 or more"),
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_k": (lambda value: value >= 1, "1 or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
}
SAMPLED = ("temperature", "top_k", "top_p", "min_p")


def run_chat(
    folder: str, file_name: str | None, system: str | None, settings: Mapping[str, float], seed: int | None
) -> None:
    """Run `optimum-cli lfm2 chat`: read messages from standard input until it ends, and print the answers.

    Raises:
        Lfm2Error: the folder is no export of ours or has no chat template, or a setting is out of its range.
    """
    check_settings(settings)
    chat = Chat(load_folder(Path(folder), file_name), system, settings)
    if seed is not None:
        set_seed(seed)
    Terminal(chat).run()


def check_settings(settings: Mapping[str, float]) -> None:
    """Raise `Lfm2Error` for a setting out of its range."""
    for name, value in settings.items():
        fits, words = RULES[name]
        if not fits(value):
            raise Lfm2Error(f"--{name.replace('_', '-')} is {value:g}; it has to be {words}.")


def generate_settings(given: Mapping[str, float]) -> dict[str, Any]:
    """Return what `generate` takes for the settings that a user gave. The model's own decide the others."""
    # Not as a GenerationConfig: transformers 4.57 puts the model's own value in the place of a False in it.
    settings = {"max_new_tokens": MAX_NEW_TOKENS, **given}
    if given.get("temperature") == 0:
        return {"do_sample": False, **{name: value for name, value in settings.items() if name not in SAMPLED}}
    return settings | ({"do_sample": True} if given.keys() & set(SAMPLED) else {})


class Chat:
    """The messages so far, and the cache of what the model has read of them.

    Attributes:
        settings: what `generate` takes for every answer.
        messages: as a chat template takes them.
        read: how many tokens the last turn read; those of earlier turns are in the cache.
        answer: the last answer.
    """

    def __init__(self, loaded: Loaded, system: str | None, settings: Mapping[str, float]) -> None:
        self._model, self._tokenizer, self._processor = loaded.model, loaded.tokenizer, loaded.processor
        self._template = loaded.processor or loaded.tokenizer
        if not getattr(self._template, "chat_template", None) and not self._tokenizer.chat_template:
            raise Lfm2Error(
                f"{self._model.path.parent} has no chat template, so it is a model to complete text. Copy "
                "chat_template.jinja there from a model that was tuned for chats."
            )
        self._system = system
        self.settings = generate_settings(settings)
        self.reset()

    @property
    def sees(self) -> bool:
        """Whether it takes pictures."""
        return self._processor is not None

    def reset(self) -> None:
        """Forget every turn. The system prompt stays."""
        self.messages: list[dict[str, Any]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._content(self._system, [])})
        self._pictures: list[Any] = []
        self._forget()

    def _forget(self) -> None:
        """Forget what was read. The next turn reads the whole chat."""
        self._cache: Any = None
        self._text, self._ids = "", torch.zeros((1, 0), dtype=torch.int64)

    def _content(self, text: str, pictures: list[Path]) -> Any:
        if not self.sees:
            return text
        return [*({"type": "image", "path": str(path)} for path in pictures), {"type": "text", "text": text}]

    def say(self, text: str, pictures: list[Path], out: Callable[[str], object]) -> None:
        """Add a message, and stream the answer to `out`.

        An interrupted answer stays in the chat as far as it was written, and so does the message.

        Args:
            text: the message.
            pictures: files that are shown with it.
            out: takes each piece of the answer.

        Raises:
            Lfm2Error: a picture cannot be read, or the chat is longer than the model takes. The chat stays as it was.
        """
        new = [read_picture(path) for path in pictures]
        message = {"role": "user", "content": self._content(text, pictures)}
        rendered = self._render([*self.messages, message])
        if self._cache is not None and rendered.startswith(self._text):
            inputs = self._encoded(rendered[len(self._text) :], new)
            inputs["input_ids"] = torch.cat([self._ids, inputs["input_ids"]], dim=1)
        else:  # the first turn, or a template that leaves out a part of earlier answers
            self._forget()
            inputs = self._encoded(rendered, [*self._pictures, *new])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        room = self._room(inputs["input_ids"].shape[1])
        self.messages.append(message)
        self._pictures += new
        answer = self._answer(inputs, room, out)
        self._text = rendered + answer
        ended = self._tokenizer.eos_token or ""
        self.messages.append({"role": "assistant", "content": self._content(answer.removesuffix(ended), [])})

    def _render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self._template.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # of the template, which is code of the model's
            raise Lfm2Error(f"The model's chat template fails: {' '.join(str(error).split())}") from error

    def _encoded(self, text: str, pictures: list[Any]) -> dict[str, Any]:
        if not pictures:
            return {"input_ids": self._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]}
        return dict(self._processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt"))

    def _room(self, length: int) -> int:
        """Return how many tokens an answer may have after so many, since it has to end within the model's positions."""
        most = self._model.config.get_text_config().max_position_embeddings
        if length >= most:
            raise Lfm2Error(
                f"The chat has {length} tokens with this message; the model takes {most}. Begin a new one with /reset."
            )
        return min(int(self.settings["max_new_tokens"]), most - length)

    def _answer(self, inputs: dict[str, Any], room: int, out: Callable[[str], object]) -> str:
        """Generate, and return the answer as it was written, with its special tokens."""
        prompt = inputs["input_ids"]
        self.read = prompt.shape[1] - (0 if self._cache is None else self._cache.get_seq_length())
        cache, self._cache = self._cache, None  # nothing to go on from where the call does not return
        streamer = self.answer = Answer(self._tokenizer, out)
        with suppress(KeyboardInterrupt), _interruptible(streamer) as stop:
            result = self._model.generate(
                **inputs,
                **self.settings | {"max_new_tokens": room},
                past_key_values=cache,
                return_dict_in_generate=True,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
            self._cache = result[compat.CACHE]
        self._ids = torch.cat([prompt, torch.tensor([streamer.tokens], dtype=torch.int64)], dim=1)
        return str(self._tokenizer.decode(streamer.tokens, clean_up_tokenization_spaces=False))

    def save(self, path: Path) -> None:
        """Write the messages as a JSON list."""
        path.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Answer(TextStreamer):
    """Hands each piece of text on, and remembers the tokens and when they came."""

    def __init__(self, tokenizer: Any, out: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.begun = self.first = self.last = time.perf_counter()
        self._out = out

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            self.first = self.first if self.tokens else self.last
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._out(text)

    def speed(self) -> str:
        """Say how long the first token took, and how fast the others came."""
        rate = (len(self.tokens) - 1) / max(self.last - self.first, 1e-9)
        return f"{len(self.tokens)} tokens, {rate:.1f} tok/s, the first after {self.first - self.begun:.2f} s"


class _Interrupt(StoppingCriteria):
    """Ends an answer after the token that is being computed."""

    asked = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool)


@contextmanager
def _interruptible(streamer: Answer) -> Iterator[_Interrupt]:
    """Within the `with` block Ctrl-C asks the criterion to end the answer; before a token, or again, it raises."""
    stop = _Interrupt()

    def interrupt(*_: object) -> None:
        if stop.asked or not streamer.tokens:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """Reads messages and commands line by line, and prints answers. Hints go to a terminal alone."""

    def __init__(self, chat: Chat, source: TextIO | None = None, target: TextIO | None = None) -> None:
        self._chat = chat
        self._source, self._target = source or sys.stdin, target or sys.stdout
        self._talks = self._source.isatty()  # somebody types
        self._shows = self._target.isatty()  # somebody reads
        self._pictures: list[Path] = []
        self._commands = {"/reset": self._reset, "/save": self._save, "/picture": self._picture, "/help": self._help}

    def run(self) -> None:
        """Run until the input ends or says `/exit`."""
        if self._talks:
            with suppress(ImportError):
                import readline  # noqa: F401  arrows and history in input()
            self._print(f"{HELP}\n")
        for line in self._lines():
            words = line.strip()
            if words == "/exit":
                return
            try:
                self._obey(words)
            except Lfm2Error as error:
                print(f"optimum-cli: {error}", file=sys.stderr)
            except BrokenPipeError:  # nobody reads the answers any more, nor what Python flushes at its end
                with suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._target.fileno())
                return
            except OSError as error:
                print(f"optimum-cli: {' '.join(str(error).split())}", file=sys.stderr)

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                line = input("> ") + "\n" if self._talks else self._source.readline()
            except EOFError:
                self._print("\n")
                return
            except KeyboardInterrupt:
                self._print("\nCtrl-D or /exit ends the chat.\n")
                continue
            if not line:
                return
            if line.strip():
                yield line

    def _obey(self, words: str) -> None:
        if not words.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in words):
            raise Lfm2Error("The line has bytes that are no text in UTF-8.")
        name, _, rest = words.partition(" ")
        if name in self._commands:
            self._commands[name](rest.strip())
        elif name.startswith("/"):
            raise Lfm2Error(f"{name} is no command. {HELP}")
        else:
            self._say(words)

    def _say(self, text: str) -> None:
        pictures, self._pictures = self._pictures, []
        self._chat.say(text, pictures, self._print)
        self._print("\n")
        if self._shows:
            self._print(f"[read {self._chat.read} tokens; {self._chat.answer.speed()}]\n")

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self._pictures = []

    def _save(self, name: str) -> None:
        if not name:
            raise Lfm2Error("/save needs the name of a file.")
        self._chat.save(Path(name))

    def _picture(self, name: str) -> None:
        if not self._chat.sees:
            raise Lfm2Error("This model takes no pictures. Export an LFM2-VL or LFM3-VL for that.")
        read_picture(Path(name))  # what is wrong with it is said at once
        self._pictures.append(Path(name))

    def _help(self, _: str) -> None:
        self._print(f"{HELP}\n")

    def _print(self, text: str) -> None:
        self._target.write(text)
        self._target.flush()

"""`optimum-cli lfm2 chat`: turns that go on from a cache, commands, interruptions, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import gold_tokens

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.serving.chat import Chat, Terminal
from optimum_lfm2.serving.folder import load_folder


ROOT = Path(__file__).parents[2]
TURNS = ["What is 3 plus 4?", "Where do bees live?", "Tell me a story about a fox."]
STORY = "Ben put the silver key next to the well. Tell me a story."


@pytest.fixture(scope="module")
def loaded(exported):
    return load_folder(exported("trained"))


@pytest.fixture
def say():
    """`say(chat, text)` adds a message and returns the answer as it was streamed."""

    def say(chat: Chat, text: str) -> str:
        pieces: list[str] = []
        chat.say(text, [], pieces.append)
        return "".join(pieces)

    return say


def expected(loaded, gold_model, messages: list[dict]) -> str:
    """What transformers answers when it reads the whole chat, without a cache."""
    text = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    tokens = gold_tokens(gold_model("trained"), ids, 24)
    ended = tokens.index(7) if 7 in tokens else len(tokens)
    return loaded.tokenizer.decode(tokens[:ended])


def test_every_turn_answers_as_transformers_and_reads_its_own_tokens(loaded, gold_model, say):
    chat = Chat(loaded, "You are kind.", {"max_new_tokens": 24})
    messages = [{"role": "system", "content": "You are kind."}]
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        gold = expected(loaded, gold_model, messages)
        assert say(chat, turn) == gold
        messages.append({"role": "assistant", "content": gold})
        own = len(loaded.tokenizer(turn)["input_ids"])
        # Besides: the roles and ends of two messages, and the last token of the answer before.
        assert own < chat.read < own + (30 if len(messages) == 3 else 16)
    assert chat.messages == messages


def test_an_answer_that_reached_its_limit_goes_on_right(loaded, gold_model, say):
    """Its last token is in no cache, and no end of turn was written."""
    chat = Chat(loaded, None, {"max_new_tokens": 5})
    first = say(chat, STORY)
    messages = [{"role": "user", "content": STORY}, {"role": "assistant", "content": first}]
    messages.append({"role": "user", "content": TURNS[0]})
    chat.settings["max_new_tokens"] = 24
    assert say(chat, TURNS[0]) == expected(loaded, gold_model, messages)
    assert chat.read < 30


def test_a_template_that_drops_a_part_of_answers_is_read_anew(loaded, say, monkeypatch):
    """As templates of models that think do."""
    template = loaded.tokenizer.chat_template.replace("message['content']", "message['content'].split(' is 7')[-1]")
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    chat = Chat(loaded, None, {"max_new_tokens": 24})
    say(chat, TURNS[0])
    say(chat, TURNS[1])
    text = loaded.tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, tokenize=False)
    assert "is 7" not in text
    assert chat.read == len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])


def interrupted(chat: Chat, text: str, after: int) -> str:
    """Ask, and press Ctrl-C after so many pieces."""
    pieces: list[str] = []

    def out(piece: str) -> None:
        pieces.append(piece)
        if len([one for one in pieces if one]) == after:
            os.kill(os.getpid(), signal.SIGINT)

    chat.say(text, [], out)
    return "".join(pieces)


def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(loaded, gold_model, say):
    chat = Chat(loaded, None, {"max_new_tokens": 64})
    handler = signal.getsignal(signal.SIGINT)
    first = interrupted(chat, STORY, 3)
    assert signal.getsignal(signal.SIGINT) is handler
    assert 3 <= len(chat.answer.tokens) < 12
    messages = [{"role": "user", "content": STORY}, {"role": "assistant", "content": first}]
    assert chat.messages == messages
    chat.settings["max_new_tokens"] = 24
    messages.append({"role": "user", "content": TURNS[0]})
    assert say(chat, TURNS[0]) == expected(loaded, gold_model, messages)
    assert chat.read < 30


def test_ctrl_c_while_it_reads_forgets_what_was_read(loaded, gold_model, say, monkeypatch):
    chat = Chat(loaded, None, {"max_new_tokens": 24})
    run = type(loaded.model).forward

    def pressed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return run(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(loaded.model), "forward", pressed)
        assert say(chat, STORY) == ""
    messages = [{"role": "user", "content": STORY}, {"role": "assistant", "content": ""}]
    messages.append({"role": "user", "content": TURNS[0]})
    assert say(chat, TURNS[0]) == expected(loaded, gold_model, messages)


def test_settings_reach_generate(loaded, say):
    def answer(seed: int = 3, **settings) -> str:
        torch.manual_seed(seed)
        return say(Chat(loaded, None, {"max_new_tokens": 24, **settings}), STORY)

    greedy = answer()
    assert answer(temperature=2.0) != greedy
    assert answer(temperature=2.0) == answer(temperature=2.0) != answer(seed=4, temperature=2.0)
    assert answer(temperature=0) == answer(temperature=2.0, top_k=1) == answer(temperature=2.0, min_p=1) == greedy
    assert answer(temperature=2.0, top_p=1e-6) == greedy
    assert answer(repetition_penalty=3.0) != greedy
    loaded.model.generation_config.update(do_sample=True, temperature=2.0)
    try:
        assert answer() == answer(temperature=2.0) != answer(temperature=0) == greedy
    finally:
        loaded.model.generation_config.update(do_sample=False, temperature=1.0)


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def piped(loaded, *lines: str, target: io.StringIO | None = None, **settings) -> str:
    target = target or io.StringIO()
    Terminal(Chat(loaded, None, {"max_new_tokens": 24, **settings}), io.StringIO("\n".join(lines)), target).run()
    return target.getvalue()


def test_a_line_that_is_no_text_and_a_reader_that_has_gone(loaded, capsys):
    assert piped(loaded, "Hi \udcff", TURNS[0]) == "3 plus 4 is 7.\n"
    assert capsys.readouterr().err == "optimum-cli: The line has bytes that are no text in UTF-8.\n"

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    lines = io.StringIO("\n".join(TURNS))
    Terminal(Chat(loaded, None, {"max_new_tokens": 24}), lines, Closed()).run()
    assert lines.read() == "\n".join(TURNS[1:]), "the chat ends, and reads no more"


def test_piped_lines_give_answers_alone(loaded, tmp_path, capsys):
    path = tmp_path / "chat.json"
    said = piped(loaded, TURNS[0], "", "/reset", TURNS[1], f"/save {path}", "/exit", TURNS[2])
    saved = json.loads(path.read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[0]["content"] == TURNS[1]
    assert said == f"{piped(loaded, TURNS[0])}{saved[1]['content']}\n"
    assert said.count("\n") == 2
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_the_speed(loaded):
    assert " tok/s" in piped(loaded, TURNS[0], target=Screen())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nonsense", "/nonsense is no command"),
        ("/save", "needs the name"),
        ("/save /no/such/folder/chat.json", "/no/such/folder"),
        ("/picture cat.png", "takes no pictures"),
        ("word " * 1100, "the model takes 1024"),
    ],
)
def test_a_bad_line_is_answered_and_the_chat_goes_on(line, words, loaded, capsys):
    assert piped(loaded, line, TURNS[0]) == piped(loaded, TURNS[0])
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_an_answer_ends_within_the_models_positions(loaded, say):
    chat = Chat(loaded, None, {"max_new_tokens": 40})
    chat.settings["sequence_bias"] = [[[loaded.tokenizer.eos_token_id], -1e4]]  # no answer ends by itself
    say(chat, "word " * 935)
    assert 980 < chat._ids.shape[1] < 1000
    say(chat, "word")
    assert chat._ids.shape[1] == 1024


def test_the_command_itself(exported, loaded, cli, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{STORY}\n"))
    monkeypatch.setattr(sys, "stdout", said)
    options = ["--max-new-tokens", 20, "--temperature", "1.5", "--seed", 3]
    assert cli("lfm2", "chat", exported("trained"), *options) == (0, "")
    torch.manual_seed(3)
    assert said.getvalue() == piped(loaded, STORY, max_new_tokens=20, temperature=1.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--temperature", "-1"], "--temperature is -1; it has to be 0 or more"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--top-k", "0"], "--top-k is 0"),
        (["--min-p", "-0.1"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it has to be 1 or more"),
        (["--file-name", "model_q4.onnx"], "has no model_q4.onnx. It has model.onnx"),
    ],
)
def test_wrong_settings_are_one_line(settings, words, cli, exported):
    code, err = cli("lfm2", "chat", exported("trained"), *settings)
    assert code == 1
    assert words in err
    assert err.count("\n") == 1


def test_what_is_no_export_is_one_line(cli, exported, checkpoint, tmp_path):
    def refused(words: str, folder: object = tmp_path) -> None:
        code, err = cli("lfm2", "chat", folder)
        assert code == 1
        assert words in err
        assert err.count("\n") == 1

    refused("does not exist", tmp_path / "nowhere")
    refused("has no config.json")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused("of the type gpt2")
    refused("export it first", checkpoint("trained"))
    refused("is a file", tmp_path / "config.json")
    copy = shutil.copytree(exported("trained"), tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    refused("no chat template", copy)
    (copy / "tokenizer.json").unlink()
    refused("has no tokenizer.json", copy)
    shutil.copy(exported("trained") / "tokenizer.json", copy)
    (copy / "model.onnx").rename(copy / "model_q4.onnx")
    shutil.copy(copy / "model_q4.onnx", copy / "model_q8.onnx")
    refused("holds model_q4.onnx, model_q8.onnx. Choose one", copy)


def test_an_export_without_caches_is_refused(exported):
    with pytest.raises(Lfm2Error, match="no cache inputs"):
        load_folder(exported("trained", task="text-generation"))

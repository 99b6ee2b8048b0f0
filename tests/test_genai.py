"""An exported folder in onnxruntime-genai itself: its greedy tokens are those of transformers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from optimum.exporters.onnx import main_export
from transformers import AutoModelForCausalLM, AutoTokenizer


og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)

CHECKPOINT = Path(__file__).parents[1] / "demo" / "checkpoint"
QUESTIONS = ["What color is the sky?", "Tell me a short story about a fox and a river.", "Hi"]
NEW_TOKENS = 80


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in QUESTIONS
    ]
    return [tokenizer.encode(chat, add_special_tokens=False) for chat in chats]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genai")
    import optimum_lfm2  # noqa: F401  registers the export

    main_export(str(CHECKPOINT), str(folder), do_validation=False)
    return og.Model(str(folder))


@torch.no_grad()
def gold(reference, prompt: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """Greedy, without a cache, up to the end of the turn, whose token is left out as in onnxruntime-genai."""
    ids = list(prompt)
    for _ in range(new_tokens):
        token = int(reference(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == reference.config.eos_token_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def make_generator(model, batch_size: int = 1, max_length: int = 256):
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=max_length, batch_size=batch_size)
    return og.Generator(model, params)


def run(generator, new_tokens: int = NEW_TOKENS) -> None:
    for _ in range(new_tokens):
        if generator.is_done():
            break
        generator.generate_next_token()


def test_single_rows(model, reference, prompts):
    for prompt in prompts:
        generator = make_generator(model)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        run(generator)
        assert generator.get_sequence(0)[len(prompt) :].tolist() == gold(reference, prompt)


def test_rows_of_unequal_length_padded_as_the_client_pads(model, reference, prompts):
    """onnxruntime-genai pads on the right."""
    longest = max(map(len, prompts))
    pad = reference.config.pad_token_id
    batch = np.array([prompt + [pad] * (longest - len(prompt)) for prompt in prompts], dtype=np.int32)
    assert len(set(map(len, prompts))) == len(prompts)
    generator = make_generator(model, len(prompts))
    generator.append_tokens(batch)
    run(generator)
    for row, prompt in enumerate(prompts):
        expected = gold(reference, prompt)
        assert generator.get_sequence(row)[longest:].tolist()[: len(expected)] == expected


def test_second_turn_continues_the_first(model, reference, prompts):
    first = prompts[0]
    answer = gold(reference, first)
    assert 0 < len(answer) < NEW_TOKENS, "the first turn must end by itself"
    second = [reference.config.eos_token_id, *prompts[1][1:]]  # closes the answer; the first token is the text's start
    generator = make_generator(model)
    generator.append_tokens(np.array([first], dtype=np.int32))
    run(generator)
    generator.append_tokens(np.array([second], dtype=np.int32))
    run(generator)
    history = first + answer + second
    assert generator.get_sequence(0)[len(history) :].tolist() == gold(reference, history)

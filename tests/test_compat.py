"""transformers 4 and 5 both read the checkpoints that transformers 5 saved, and the folders that we write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig, AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from optimum_lfm2 import compat


THETA = 500.0


def rewrite(path: Path, drop: tuple[str, ...] = (), **values: object) -> None:
    written = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in written.items() if name not in drop} | values))


@pytest.fixture(scope="module")
def saved_by_5(checkpoint, tmp_path_factory):
    """A checkpoint with three settings spelled as in transformers 5, and a tokenizer with an extra special token."""
    folder = tmp_path_factory.mktemp("five") / "checkpoint"
    shutil.copytree(checkpoint("rope_theta"), folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("trained") / file, folder)
    rope = {"rope_theta": THETA, "rope_type": "default"}
    rewrite(folder / "config.json", ("rope_theta", "torch_dtype"), rope_parameters=rope, dtype="float32")
    rewrite(
        folder / "tokenizer_config.json",
        ("added_tokens_decoder",),
        tokenizer_class="TokenizersBackend",
        backend="tokenizers",
        is_local=True,
        extra_special_tokens=["<|fim_pre|>"],
    )
    return folder


@pytest.fixture(scope="module")
def exported(saved_by_5, tmp_path_factory):
    folder = tmp_path_factory.mktemp("five_onnx")
    main_export(str(saved_by_5), folder)
    return folder


def test_nested_rope_theta_is_honoured(checkpoint, exported):
    model = Lfm2ForCausalLM.from_pretrained(checkpoint("rope_theta")).eval()
    assert model.model.rotary_emb.inv_freq[1] == pytest.approx(THETA ** -(2 / 16))
    prompt = prompts([40])[0]
    gold = gold_tokens(model, prompt, 32)
    ours = ORTModelForCausalLM.from_pretrained(exported)
    tokens = ours.generate(prompt[None], max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert tokens[0, len(prompt) :].tolist() == gold

    # The default theta must give other tokens, otherwise the test proves nothing.
    config = Lfm2Config.from_pretrained(checkpoint("rope_theta"))
    config.rope_theta = 1e6
    if compat.TRANSFORMERS_5:
        config.rope_parameters["rope_theta"] = 1e6
    other = Lfm2ForCausalLM.from_pretrained(checkpoint("rope_theta"), config=config).eval()
    assert gold_tokens(other, prompt, 32) != gold


def test_exported_config_says_the_rope_in_both_spellings(exported):
    written = json.loads((exported / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == THETA


def test_scaled_rope_is_read_where_it_is_nested(tmp_path, checkpoint):
    shutil.copytree(checkpoint("hybrid"), tmp_path / "scaled")
    rope = {"rope_theta": THETA, "rope_type": "linear", "factor": 4.0}
    rewrite(tmp_path / "scaled" / "config.json", ("rope_theta",), rope_parameters=rope)
    config = AutoConfig.from_pretrained(tmp_path / "scaled")
    compat.spell_rope_for_both(config)
    frequencies = Lfm2ForCausalLM(config).model.rotary_emb.inv_freq
    assert torch.allclose(frequencies[:2], torch.tensor([1.0, THETA ** -(2 / 16)]) / 4)


def test_config_without_rope_parameters_is_left_alone():
    config = Lfm2Config(rope_theta=THETA)
    vars(config).pop("rope_parameters", None)
    before = dict(vars(config))
    compat.spell_rope_for_both(config)
    assert vars(config) == before


def test_tokenizer_of_5_loads_and_is_exported(saved_by_5, exported, checkpoint):
    text = "<|im_start|>Once upon a time<|fim_pre|>"
    gold = AutoTokenizer.from_pretrained(checkpoint("trained"))(text).input_ids
    for folder in (saved_by_5, exported):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(text).input_ids == gold
        assert "<|fim_pre|>" in tokenizer.all_special_tokens
    assert len(gold) > 3


def test_exported_tokenizer_needs_neither_us_nor_5(exported):
    written = json.loads((exported / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(written.get("extra_special_tokens"), list)


def test_tokenizer_config_in_5_spelling_is_rewritten(saved_by_5, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved_by_5 / file, tmp_path)
    compat.spell_tokenizer_for_both(tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|fim_pre|>"]
    assert "<|fim_pre|>" in AutoTokenizer.from_pretrained(tmp_path).all_special_tokens

    before = (tmp_path / "tokenizer_config.json").read_text()
    compat.spell_tokenizer_for_both(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == before


def test_folder_without_tokenizer_is_left_alone(tmp_path):
    compat.spell_tokenizer_for_both(tmp_path)
    assert not list(tmp_path.iterdir())


def test_exported_chat_template_is_in_both_places(exported, checkpoint):
    written = json.loads((exported / "tokenizer_config.json").read_text())
    template = (exported / "chat_template.jinja").read_text()
    assert written["chat_template"] == template == AutoTokenizer.from_pretrained(checkpoint("trained")).chat_template

    chat = [{"role": "user", "content": "Hi"}]
    (gold, ours) = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for folder in (checkpoint("trained"), exported)
    )
    assert ours == gold


def test_tokenizer_without_chat_template_is_left_alone(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    compat.repeat_chat_template(tmp_path)
    assert (tmp_path / "tokenizer_config.json").read_text() == "{}"

"""What optimum-onnx 0.1.0 asks of its own decoders (its tests/onnxruntime/test_decoder.py), asked of ours."""

from __future__ import annotations

import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM, pipeline
from transformers import AutoTokenizer, GenerationConfig

from optimum_lfm2 import ORTLfm2ForCausalLM, compat


# No end of text within these: its logit is hidden, as transformers does.
TOKENS = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
PROMPT = "Once upon a time there was a girl named"


def loaded(folder, **options) -> ORTLfm2ForCausalLM:
    model = ORTModelForCausalLM.from_pretrained(folder, **options)
    assert isinstance(model, ORTLfm2ForCausalLM)
    return model


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("task", ["text-generation-with-past", "text-generation"])
def test_logits_and_generation_with_and_without_cache_and_binding(task, use_cache, exported, gold_model):
    """Loaded as `use_cache` says; a graph without a cache is loaded either way, and never uses one."""
    ids, uses = prompts([9])[0][None], use_cache and task == "text-generation-with-past"
    with torch.no_grad():
        expected = gold_model("hybrid")(input_ids=ids, use_cache=False).logits
    tokens = gold_model("hybrid").generate(ids, **TOKENS | {"use_cache": False}).tolist()
    assert len(set(tokens[0])) > 10
    for use_io_binding in (True, False):
        model = loaded(exported("hybrid", task=task), use_cache=use_cache, use_io_binding=use_io_binding)
        assert model.use_io_binding == use_io_binding
        assert model.config.use_cache == model.generation_config.use_cache == uses
        out = model(ids, **TOKENS)
        torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
        assert (out.get(compat.CACHE) is not None) == uses
        assert model.generate(ids, **TOKENS).tolist() == tokens


def test_sampled_beams(exported, gold_model):
    ids, model = prompts([9])[0][None], loaded(exported("hybrid"))
    settings = GenerationConfig(max_new_tokens=6, min_new_tokens=6, num_beams=4, do_sample=True, pad_token_id=0)
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = gold_model("hybrid").generate(ids, generation_config=settings, use_cache=False).tolist()
        torch.manual_seed(seed)
        assert model.generate(ids, generation_config=settings).tolist() == expected
        answers += expected
    assert answers[0] != answers[1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_pipeline_saved_and_loaded_again(use_cache, exported, gold_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported("trained"))
    first = pipeline("text-generation", loaded(exported("trained"), use_cache=use_cache), tokenizer=tokenizer)
    first.save_pretrained(tmp_path)
    again = pipeline("text-generation", str(tmp_path), model_kwargs={"use_cache": use_cache})
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids[0]
    gold = torch.cat([ids, torch.tensor(gold_tokens(gold_model("trained"), ids, 12))])
    for write in (first, again):
        assert isinstance(write.model, ORTLfm2ForCausalLM)
        assert write.model.config.use_cache == use_cache
        text = write(PROMPT, max_new_tokens=12, do_sample=False)[0]["generated_text"]
        assert text == tokenizer.decode(gold, skip_special_tokens=True)


@pytest.mark.parametrize("use_cache", [True, False])
def test_exported_while_it_loads_saved_and_loaded_again(use_cache, checkpoint, gold_model, tmp_path):
    first = loaded(checkpoint("hybrid"), export=True, use_cache=use_cache)
    assert first.can_use_cache == use_cache
    first.save_pretrained(tmp_path)
    assert {"model.onnx", "model.onnx_data", "config.json"} <= {path.name for path in tmp_path.iterdir()}
    again, ids = loaded(tmp_path, use_cache=use_cache), prompts([9])[0][None]
    assert again.can_use_cache == use_cache
    tokens = gold_model("hybrid").generate(ids, **TOKENS | {"use_cache": False}).tolist()
    for model in (first, again):
        assert model.generate(ids, **TOKENS).tolist() == tokens

"""What a generation allocates and copies: columns in use, not columns that it may come to use."""

from __future__ import annotations

import pytest
import torch
from checkpoints import prompts
from optimum.onnxruntime import ORTModelForCausalLM
from torch.utils._python_dispatch import TorchDispatchMode


class Written(TorchDispatchMode):
    """Counts the elements of what torch's operators give, without those that only allocate or view."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and "empty" not in func.name():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.fixture
def model(exported):
    return ORTModelForCausalLM.from_pretrained(exported("hybrid"))


def greatest(work) -> int:
    with Written() as written:
        work()
    return written.elements


def test_a_buffer_is_not_touched_before_it_is_used(model):
    small, large = (greatest(lambda n=n: model._graph.new_cache(1, n)) for n in (16, 30000))
    assert small == large


@pytest.mark.parametrize("columns", [100, 30000])
def test_beams_copy_the_columns_in_use(columns, model):
    cache = model._graph.new_cache(3, columns)
    model(torch.stack(prompts([9, 9, 9])), past_key_values=cache)
    used = max(
        tensor[..., :9, :].numel() if name not in cache.spare else tensor.numel()
        for name, tensor in cache.tensors.items()
    )
    assert 0 < greatest(lambda: cache.reorder_cache(torch.tensor([1, 1, 0]))) <= used


def test_a_generation_has_the_room_that_it_needs(model):
    settings = {"do_sample": False, "max_new_tokens": 300, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(prompts([9])[0][None], return_dict_in_generate=True, **settings)
    cache = out.get("past_key_values") or out.get("cache")
    assert cache.get_seq_length() == 308
    assert cache.capacity in (308, 309)
    chat = torch.cat([out.sequences, prompts([5])[0][None]], dim=1)
    model.generate(chat, past_key_values=cache, **settings | {"max_new_tokens": 20})
    assert cache.get_seq_length() == 333
    assert cache.capacity in (333, 334), "a further turn has no more than it needs"

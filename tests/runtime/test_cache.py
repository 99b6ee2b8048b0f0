"""The cache by itself: growth, rows, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import prompts
from optimum.onnxruntime import ORTModelForCausalLM

from optimum_lfm2.runtime.cache import MIN_CAPACITY


@pytest.fixture
def model(exported):
    return ORTModelForCausalLM.from_pretrained(exported("hybrid"))


def step(model, cache, token: int, rows: int = 1) -> torch.Tensor:
    return model(torch.full((rows, 1), token), past_key_values=cache).logits[:, -1]


def test_it_grows_by_doubling_and_keeps_what_it_holds(model):
    cache = model(prompts([9])[0][None]).past_key_values
    twin = copy.deepcopy(cache)
    assert cache.capacity == MIN_CAPACITY
    seen = []
    for _ in range(2 * MIN_CAPACITY):
        step(model, cache, 20)
        seen.append(cache.capacity)
    assert sorted(set(seen)) == [MIN_CAPACITY, 2 * MIN_CAPACITY, 4 * MIN_CAPACITY]
    twin.reserve(9 + 2 * MIN_CAPACITY)
    for _ in range(2 * MIN_CAPACITY):
        step(model, twin, 20)
    torch.testing.assert_close(step(model, cache, 30), step(model, twin, 30))


def test_keys_and_values_stay_where_they_are(model):
    """In place: no copy a token. What moves is only which of two buffers is the past of a conv state."""
    cache = model(prompts([9])[0][None]).past_key_values
    step(model, cache, 20)
    places = [tensor.data_ptr() for tensor in cache.tensors.values()]
    bindings = list(cache.bindings.values())
    for _ in range(6):
        step(model, cache, 20)
    assert [tensor.data_ptr() for tensor in cache.tensors.values()] == places
    assert len(bindings) == 2
    assert list(cache.bindings.values()) == bindings


def test_rows_that_run_one_by_one_stay_in_one_buffer(model):
    cache = model(torch.stack(prompts([9, 9, 9]))).past_key_values
    cache.reserve(100)
    places = {name: tensor.data_ptr() for name, tensor in cache.tensors.items() if name not in cache.spare}
    model(torch.stack(prompts([5, 5, 5])), past_key_values=cache)
    assert {name: cache.tensors[name].data_ptr() for name in places} == places
    assert cache.capacity == 2 * MIN_CAPACITY


def test_rows_split_and_join(model):
    cache = model(torch.stack(prompts([9, 9, 9]))).past_key_values
    expected = copy.deepcopy(cache)
    cache.bindings = {"prepared": "for the buffers before"}
    rows = cache.split()
    for i, row in enumerate(rows):
        step(model, row, 20 + i)
    cache.join(rows)
    assert not cache.bindings, "they point to conv states that the rows' have replaced"
    assert cache.get_seq_length() == 10
    model(torch.tensor([[20], [21], [22]]), past_key_values=expected)
    for name, tensor in expected.tensors.items():
        mine = cache.tensors[name]
        if tensor.dim() == 4:
            mine, tensor = mine[:, :, :10], tensor[:, :, :10]
        torch.testing.assert_close(mine, tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("io_binding", [True, False])
def test_rows_are_reordered_repeated_and_selected(io_binding, model):
    model.use_io_binding = io_binding
    first, second = prompts([9, 9])
    cache = model(torch.stack([first, second])).past_key_values
    alone = [step(model, model(row[None]).past_key_values, 20)[0] for row in (first, second)]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    assert cache.batch_size == 3
    assert not cache.record.recording
    together = step(model, cache, 20, rows=3)
    torch.testing.assert_close(together, torch.stack([alone[1], alone[0], alone[1]]), atol=1e-5, rtol=0)


def test_a_cache_that_is_reset(model):
    """It is a new one of as many rows; any model with such layers may take it."""
    cache, ids = model(torch.stack(prompts([9, 9]))).past_key_values, torch.stack(prompts([5, 5], seed=2))
    cache.activate_past_recording()
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.record.recording, cache.made_by) == (0, 2, False, None)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_what_transformers_asks_of_a_cache(model):
    cache = model._graph.new_cache(1)
    assert not cache.has_previous_state()
    step(model, cache, 20)
    assert cache.has_previous_state()
    model(prompts([8])[0][None], past_key_values=cache)
    assert cache.get_seq_length() == cache.get_seq_length(3) == 9
    assert cache.get_max_cache_shape() == cache.get_max_length() == cache.max_cache_len == -1
    assert len(cache) == 5
    assert "length=9" in repr(cache)

"""Generation: right padding, settings that cannot be honoured, interrupts, and caches of other kinds."""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import shutil
import threading

import pytest
import torch
from checkpoints import gold_tokens, prompts
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime import rows as rows_module
from optimum_lfm2.runtime.padding_warning import right_padding_allowed


NEW = 16
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
LENGTHS = [9, 1, 12, 4]


@pytest.fixture
def model(exported) -> ORTModelForCausalLM:
    return ORTModelForCausalLM.from_pretrained(exported("hybrid"))


def pad_right(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def golds(gold_model):
    return [gold_tokens(gold_model("hybrid"), row, NEW) for row in prompts(LENGTHS)]


class TestRightPadding:
    @pytest.mark.parametrize("io_binding", [True, False])
    @pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 3}, {"use_cache": False}])
    def test_each_row_goes_on_as_alone(self, settings, io_binding, model, golds):
        model.use_io_binding = io_binding
        batch = pad_right(prompts(LENGTHS))
        out = model.generate(**batch, **GREEDY, **settings)
        assert out[:, :12].tolist() == batch["input_ids"].tolist()
        assert out[:, 12:].tolist() == golds

    def test_one_column_of_padding(self, model, gold_model):
        rows = prompts([5, 4])
        golds = [gold_tokens(gold_model("hybrid"), row, NEW) for row in rows]
        assert model.generate(**pad_right(rows), **GREEDY)[:, 5:].tolist() == golds

    def test_a_graph_without_a_cache(self, exported, golds):
        model = ORTModelForCausalLM.from_pretrained(exported("hybrid", task="text-generation"))
        assert model.generate(**pad_right(prompts(LENGTHS)), **GREEDY)[:, 12:].tolist() == golds

    def test_beams(self, model, gold_model):
        rows = prompts(LENGTHS)
        alone = [gold_model("hybrid").generate(row[None], use_cache=False, num_beams=3, **GREEDY)[0] for row in rows]
        out = model.generate(**pad_right(rows), num_beams=3, **GREEDY)[:, 12:].tolist()
        assert out == [gold[len(row) :].tolist() for gold, row in zip(alone, rows, strict=True)]

    def test_long_prompts_run_in_chunks(self, model, golds, monkeypatch):
        monkeypatch.setattr(rows_module, "PREFILL_CHUNK", 5)
        assert model.generate(**pad_right(prompts(LENGTHS)), **GREEDY)[:, 12:].tolist() == golds

    @pytest.mark.parametrize("io_binding", [True, False])
    @pytest.mark.parametrize("chunk", [2, 512])
    def test_a_second_turn(self, chunk, io_binding, model, gold_model, monkeypatch):
        """Rows of a second turn take one to six calls of the graph: their conv states end in either buffer."""
        monkeypatch.setattr(rows_module, "PREFILL_CHUNK", chunk)
        model.use_io_binding = io_binding
        first, second = prompts([9, 2, 5]), prompts([3, 12, 1], seed=3)
        golds = [gold_tokens(gold_model("hybrid"), torch.cat(pair), NEW) for pair in zip(first, second, strict=True)]
        one, two = pad_right(first), pad_right(second)
        whole = {name: torch.cat([one[name], two[name]], dim=1) for name in one}
        out = model.generate(**whole, past_key_values=model(**one).past_key_values, **GREEDY)
        assert out[:, 21:].tolist() == golds

    def test_a_second_turn_with_padding_on_both_sides(self, model, gold_model):
        first, second = prompts([5, 5]), prompts([2, 3], seed=3)
        golds = [gold_tokens(gold_model("hybrid"), torch.cat(pair), NEW) for pair in zip(first, second, strict=True)]
        cache, mask = model(torch.stack(first)).past_key_values, torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])
        ids = torch.full((2, 4), 9).masked_scatter(mask == 1, torch.cat(second))
        whole = torch.cat([torch.stack(first), ids], dim=1)
        mask = torch.cat([torch.ones(2, 5, dtype=torch.int64), mask], dim=1)
        out = model.generate(whole, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert out[:, 9:].tolist() == golds

    def test_sampling_with_a_seed(self, model, gold_model):
        """One row draws as alone. Several share the generator: they draw as the same rows padded on the left."""
        settings = {**GREEDY, "do_sample": True, "temperature": 1.3, "top_k": 40}
        rows = prompts(LENGTHS)
        torch.manual_seed(3)
        alone = gold_model("hybrid").generate(rows[0][None], **settings)[0, 9:].tolist()
        one = {name: tensor[:1] for name, tensor in pad_right(rows).items()}
        torch.manual_seed(3)
        assert model.generate(**one, **settings)[0, 12:].tolist() == alone

        right = pad_right(rows)
        left = {
            name: torch.stack([r.roll(12 - len(p)) for r, p in zip(t, rows, strict=True)]) for name, t in right.items()
        }
        drawn = []
        for batch in (left, right):
            torch.manual_seed(3)
            drawn.append(model.generate(**batch, **settings)[:, 12:].tolist())
        assert drawn[0] == drawn[1]

    @pytest.mark.parametrize(
        "settings",
        [
            {"guidance_scale": 1.5},
            {"watermarking_config": WatermarkingConfig(bias=4.0, context_width=1)},
            {"watermarking_config": WatermarkingConfig(bias=4.0, context_width=3, seeding_scheme="selfhash")},
            {"sequence_bias": True},
            {"guidance_scale": 1.5, "num_beams": 3},
        ],
        ids=str,
    )
    def test_what_begins_at_the_last_column_begins_at_the_last_token(self, settings, model, gold_model):
        """In the first turn, and in a second one on a cache: by all ids, and by the new ones alone."""
        first, second = prompts([9, 2, 5]), prompts([3, 12, 1], seed=3)
        settings = {**GREEDY, "max_new_tokens": 6, **settings}
        plain = [gold_tokens(gold_model("hybrid"), row, 6) for row in first]

        def options(rows: list[torch.Tensor]) -> dict:
            biases = [[[int(row[-1]), 77], 50.0] for row in rows]
            return settings | ({"sequence_bias": biases} if settings.get("sequence_bias") else {})

        def alone(rows: list[torch.Tensor]) -> list[list[int]]:
            gold, own = gold_model("hybrid"), options(rows)
            return [gold.generate(row[None], use_cache=False, **own)[0, len(row) :].tolist() for row in rows]

        def together(rows: list[torch.Tensor], **given) -> list[list[int]]:
            return model.generate(**given, **options(rows))[:, given["input_ids"].shape[1] :].tolist()

        one, two = pad_right(first), pad_right(second)
        golds = alone(first)
        assert golds != plain
        assert together(first, **one) == golds
        if "num_beams" in settings:
            return
        chats = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        golds = alone(chats)
        mask = torch.cat([one["attention_mask"], two["attention_mask"]], dim=1)
        whole = {"input_ids": torch.cat([one["input_ids"], two["input_ids"]], dim=1), "attention_mask": mask}
        new = {"input_ids": two["input_ids"], "attention_mask": mask}
        cache = model(**one, return_dict=False)[1]
        assert together(chats, **whole, past_key_values=copy.deepcopy(cache)) == golds
        watermark = settings.get("watermarking_config")
        if watermark is None or watermark.context_width == 1:  # others read the text before these ids, too
            assert together(chats, **new, past_key_values=cache) == golds

    def test_stopping_criteria_read_the_rows_as_they_go_on(self, model, gold_model):
        row = prompts([5])[0]
        gold = gold_tokens(gold_model("hybrid"), row, NEW)

        class Pair(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.tensor([ids[-2:] == [int(row[-1]), gold[0]] for ids in input_ids.tolist()])

        ids = torch.cat([row, torch.tensor([9, 9])])[None]
        mask = torch.tensor([[1] * 5 + [0] * 2])
        stops = StoppingCriteriaList([Pair()])
        assert model.generate(ids, attention_mask=mask, stopping_criteria=stops, **GREEDY)[0, 7:].tolist() == gold[:1]
        out = model.generate(ids, attention_mask=mask, stopping_criteria=stops, prompt_lookup_num_tokens=3, **GREEDY)
        assert out[0, 7:].tolist() == gold[:1]

    def test_a_streamer(self, model, golds):
        class Collector(BaseStreamer):
            values: list[torch.Tensor]
            ended = False

            def put(self, value):
                self.values.append(value)

            def end(self):
                self.ended = True

        collector = Collector()
        collector.values = []
        one = {name: tensor[:1] for name, tensor in pad_right(prompts(LENGTHS)).items()}
        model.generate(**one, **GREEDY, streamer=collector)
        assert collector.values[0].tolist() == one["input_ids"].tolist()
        assert torch.cat(collector.values[1:]).tolist() == golds[0]
        assert collector.ended

    def test_scores_and_logits(self, model, gold_model):
        settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        out = model.generate(**pad_right(prompts(LENGTHS)), **settings)
        for i, row in enumerate(prompts(LENGTHS)):
            alone = gold_model("hybrid").generate(row[None], use_cache=False, **settings)
            for name in ("logits", "scores"):
                mine, expected = (torch.stack(source[name]) for source in (out, alone))
                torch.testing.assert_close(mine[:, i], expected[:, 0], atol=1e-4, rtol=0)

    def test_nobody_is_warned_who_uses_our_model(self, model, gold_model, caplog, monkeypatch):
        logger = logging.getLogger("transformers.generation.utils")
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        batch = pad_right(prompts(LENGTHS))
        settings = {**GREEDY, "max_new_tokens": 1, "pad_token_id": 9}
        filters = list(logger.filters)
        model.generate(**batch, **settings)
        assert "right-padding" not in caplog.text
        assert logger.filters == filters
        with right_padding_allowed():
            logger.warning("something else")
            elsewhere = threading.Thread(target=logger.warning, args=("right-padding was detected",))
            elsewhere.start()
            elsewhere.join()
        assert "something else" in caplog.text
        assert "right-padding" in caplog.text, "another thread's model may need the warning"
        caplog.clear()
        gold_model("hybrid").generate(**batch, **settings, use_cache=False)
        assert "right-padding" in caplog.text

    def test_a_row_that_has_no_token(self, model):
        with pytest.raises(Lfm2Error, match="every new token of row 1"):
            model.generate(torch.full((2, 3), 9), attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]), **GREEDY)


class TestFailures:
    @pytest.mark.parametrize("any_padding", [True, False])
    @pytest.mark.parametrize("io_binding", [True, False])
    @pytest.mark.parametrize(("chunk", "lengths", "call"), [(2, [5, 4], 5), (1, [2, 2], 4)], ids=["long", "short"])
    def test_an_interrupt_leaves_the_cache_as_it_was(
        self, chunk, lengths, call, any_padding, io_binding, model, monkeypatch
    ):
        """In the second row's second chunk, when others have been written."""
        monkeypatch.setattr(rows_module, "PREFILL_CHUNK", chunk)
        model.use_io_binding = io_binding
        model._rows._any_padding = any_padding
        one, two = pad_right(prompts([4, 2])), pad_right(prompts(lengths, seed=3))
        mask = torch.cat([one["attention_mask"], two["attention_mask"]], dim=1)
        cache = model(**one).past_key_values
        expected = model(two["input_ids"], attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        run, calls = model._graph.run, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return run(*args)

        monkeypatch.setattr(model._graph, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(two["input_ids"], attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 4
        again = model(two["input_ids"], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)

    def test_an_interrupt_of_a_second_turn_that_is_padded_on_the_right(self, model, monkeypatch):
        """In the second row's second chunk, when the first row has overwritten its state's first buffer."""
        monkeypatch.setattr(rows_module, "PREFILL_CHUNK", 2)
        one, two = torch.stack(prompts([4, 4])), pad_right(prompts([6, 4], seed=3))
        cache = model(one).past_key_values
        mask = torch.cat([torch.ones(2, 4, dtype=torch.int64), two["attention_mask"]], dim=1)
        expected = model._rows.run_to_last(two["input_ids"], mask, copy.deepcopy(cache), io_binding=True)
        run, calls = model._graph.run, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return run(*args)

        monkeypatch.setattr(model._graph, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model._rows.run_to_last(two["input_ids"], mask, cache, io_binding=True)
        again = model._rows.run_to_last(two["input_ids"], mask, cache, io_binding=True)
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)

    def test_an_interrupt_while_rows_are_repeated(self, model, monkeypatch):
        cache = model(prompts([4])[0][None]).past_key_values
        expected = model(torch.tensor([[9]]), past_key_values=copy.deepcopy(cache)).logits
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(torch, "empty_like", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
            cache.batch_repeat_interleave(3)
        assert torch.equal(model(torch.tensor([[9]]), past_key_values=cache).logits, expected)

    def test_a_cache_on_another_device(self, model):
        cache = model(prompts([4])[0][None]).past_key_values
        cache.device = torch.device("meta")
        with pytest.raises(Lfm2Error, match="lies on meta, the model on cpu"):
            model(torch.tensor([[9]]), past_key_values=cache)

    def test_an_interrupt_while_rows_change_places(self, model):
        class Interrupted:
            def __getitem__(self, _):
                raise KeyboardInterrupt

        cache = model(torch.stack(prompts([4, 4]))).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        model(torch.tensor([[9], [9]]), past_key_values=cache)
        cache.tensors["the last"] = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            cache.reorder_cache(torch.tensor([1, 0]))
        del cache.tensors["the last"]
        with pytest.raises(Lfm2Error, match="interrupted while its rows changed places"):
            model(torch.tensor([[9], [9]]), past_key_values=cache)

    @pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"cache_implementation": "offloaded"}])
    def test_other_kinds_of_cache(self, setting, model):
        with pytest.raises(Lfm2Error, match="cache_implementation"):
            model.generate(prompts([4])[0][None], **GREEDY, **setting)

    def test_compilation(self, model):
        from transformers.generation.configuration_utils import CompileConfig

        with pytest.raises(Lfm2Error, match="compile_config"):
            model.generate(prompts([4])[0][None], **GREEDY, compile_config=CompileConfig())

    def test_labels(self, model):
        with pytest.raises(Lfm2Error, match="labels"):
            model(prompts([4])[0][None], labels=prompts([4])[0][None])

    def test_positions(self, model, golds):
        ids, right = prompts(LENGTHS)[0][None], torch.arange(9)[None]
        assert model.generate(ids, position_ids=right, **GREEDY)[0, 9:].tolist() == golds[0]
        assert torch.equal(model(ids, position_ids=right).logits, model(ids).logits)
        left, mask = torch.cat([torch.full((1, 3), 9), ids], dim=1), torch.tensor([[0] * 3 + [1] * 9])
        own = torch.cat([torch.full((1, 3), 1), right], dim=1)
        assert model.generate(left, attention_mask=mask, position_ids=own, **GREEDY)[0, 12:].tolist() == golds[0]
        for call in (model.forward, lambda *args, **kwargs: model.generate(*args, **kwargs, **GREEDY)):
            for wrong in (right + 1, right[0], right[:, 1:], right.expand(2, 9)):
                with pytest.raises(Lfm2Error, match="position_ids"):
                    call(ids, position_ids=wrong)

    @pytest.mark.parametrize("ids", [torch.zeros(1, 0, dtype=torch.int64), torch.tensor([9]), torch.tensor([[9.0]])])
    def test_ids_that_are_none(self, ids, model):
        for call in (model.forward, lambda ids: model.generate(ids, **GREEDY)):
            with pytest.raises(Lfm2Error, match="input_ids has the shape"):
                call(ids)


class TestCaches:
    def test_it_is_a_cache_of_transformers(self, model):
        cache = model(prompts([4])[0][None]).past_key_values
        assert isinstance(cache, Cache)
        assert not cache.is_compileable
        assert cache.max_batch_size == 1
        with pytest.raises(Lfm2Error, match="graph alone"):
            cache.update(torch.zeros(1), torch.zeros(1), 0)

    def test_an_empty_one_of_transformers_counts_as_none(self, model, golds):
        for empty in (DynamicCache(), DynamicCache(config=model.config)):
            out = model.generate(prompts(LENGTHS)[0][None], past_key_values=empty, **GREEDY)
            assert out[0, 9:].tolist() == golds[0]
            with pytest.raises(Lfm2Error, match="DynamicCache"):
                model(prompts([4])[0][None], past_key_values=empty)

    def test_one_that_is_not_ours(self, model):
        full = DynamicCache()
        full.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
        for cache in (full, ((torch.zeros(1),),)):
            for call in (model.forward, lambda ids, **caches: model.generate(ids, **caches, **GREEDY)):
                with pytest.raises(Lfm2Error, match=f"The cache is a {type(cache).__name__}"):
                    call(prompts([4])[0][None], past_key_values=cache)

    def test_int32_ids(self, model, golds):
        ids = prompts(LENGTHS)[0][None].to(torch.int32)
        assert model.generate(ids, **GREEDY)[0, 9:].tolist() == golds[0]
        assert torch.equal(model(ids).logits, model(ids.long()).logits)
        for options in ({"num_beams": 2}, {"repetition_penalty": 1.3}):  # the penalty looks the first ids up
            assert torch.equal(*(model.generate(given, **GREEDY, **options) for given in (ids, ids.long())))

    @pytest.mark.parametrize("way", ["pickle", "torch"])
    def test_saved_and_loaded_by_another_session(self, way, model, exported):
        cache = model(prompts([9])[0][None]).past_key_values
        token = torch.tensor([[20]])
        model(token, past_key_values=copy.deepcopy(cache))
        if way == "pickle":
            loaded = pickle.loads(pickle.dumps(cache))
        else:
            file = io.BytesIO()
            torch.save(cache, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
        other = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
        expected = [model(token, past_key_values=cache).logits for _ in range(3)]
        for logits in expected:
            assert torch.equal(other(token, past_key_values=loaded).logits, logits)

    def test_a_cache_that_changes_sessions(self, model, exported):
        other = ORTModelForCausalLM.from_pretrained(exported("hybrid"))
        cache, token = model(prompts([9])[0][None]).past_key_values, torch.tensor([[20]])
        twin = copy.deepcopy(cache)
        for user in (model, other, other, model):
            expected = model(token, past_key_values=twin).logits
            assert torch.equal(user(token, past_key_values=cache).logits, expected)

    def test_a_cache_of_another_model(self, model, exported):
        other = ORTModelForCausalLM.from_pretrained(exported("multi_query"))
        cache = other(prompts([4])[0][None]).past_key_values
        with pytest.raises(Lfm2Error, match="another model"):
            model(torch.tensor([[9]]), past_key_values=cache)
        with pytest.raises(Lfm2Error, match="another model"):
            model.generate(prompts([5])[0][None], past_key_values=cache, **GREEDY)

    def test_a_loaded_cache_of_another_model(self, model, exported):
        """Nothing says which file made it. Its layers do."""
        other = ORTModelForCausalLM.from_pretrained(exported("multi_query"))
        cache = pickle.loads(pickle.dumps(other(prompts([4])[0][None]).past_key_values))
        with pytest.raises(Lfm2Error, match="another model, whose layers differ"):
            model(torch.tensor([[9]]), past_key_values=cache)

    @pytest.mark.parametrize("io_binding", [True, False])
    def test_io_binding_as_it_is_set(self, io_binding, model, monkeypatch):
        model.use_io_binding, calls = io_binding, []
        run = model.session.run_with_iobinding
        monkeypatch.setattr(model.session, "run_with_iobinding", lambda *args: (calls.append(1), run(*args)))
        model.generate(prompts([5])[0][None], **GREEDY)
        assert bool(calls) == io_binding

    @pytest.mark.parametrize("change", ["a copy", "model.onnx", "model.onnx_data"])
    def test_a_cache_of_another_model_of_the_same_shape(self, change, model, exported, tmp_path):
        """Two fine-tunes: nothing but the files tells them apart, and their graphs are the same."""
        folder = shutil.copytree(exported("hybrid"), tmp_path / "model")
        first = model if change == "a copy" else ORTModelForCausalLM.from_pretrained(folder)
        cache = first(prompts([4])[0][None]).past_key_values
        if change != "a copy":
            status = (folder / change).stat()
            os.utime(folder / change, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        other = ORTModelForCausalLM.from_pretrained(folder)
        for theirs in (cache, copy.deepcopy(cache)):
            for call in (other.forward, lambda ids, **kwargs: other.generate(ids, **kwargs, **GREEDY)):
                with pytest.raises(Lfm2Error, match=f"another model, which was loaded from {first.path}; "):
                    call(
                        torch.tensor([[1, 2, 3, 4, 9]])[:, -1 if call == other.forward else 0 :], past_key_values=theirs
                    )
        loaded = pickle.loads(pickle.dumps(cache))
        other(torch.tensor([[9]]), past_key_values=loaded)
        with pytest.raises(Lfm2Error, match="another model, which was loaded from"):
            first(torch.tensor([[9]]), past_key_values=loaded)

    def test_copies_share_nothing_and_hold_what_is_used(self, model):
        cache = model._graph.new_cache(1, 1000)
        model(prompts([9])[0][None], past_key_values=cache)
        twin = copy.deepcopy(cache)
        assert twin.capacity == 9
        assert {tensor.shape[2] for name, tensor in twin.tensors.items() if name in cache._growing()} == {9}
        mine = {tensor.data_ptr() for tensor in (*cache.tensors.values(), *cache.spare.values())}
        assert not mine & {tensor.data_ptr() for tensor in (*twin.tensors.values(), *twin.spare.values())}

    def test_columns_that_are_not_used_are_never_read(self, model):
        """So that buffers need no zeros."""
        clean, dirty = (model._graph.new_cache(2, 40) for _ in range(2))
        for cache, value in ((clean, 0.0), (dirty, float("nan"))):
            for name in cache._growing():
                cache.tensors[name].fill_(value)
        ids, mask = torch.stack(prompts([9, 9])), torch.ones(2, 9, dtype=torch.int64)
        mask[0, :4] = 0
        for new in (ids, torch.tensor([[20], [30]]), torch.tensor([[40], [50]])):
            mask = torch.ones(2, clean.length + new.shape[1], dtype=torch.int64)
            mask[0, :4] = 0
            both = [model(new, attention_mask=mask, past_key_values=cache).logits for cache in (clean, dirty)]
            assert torch.equal(*both)

    def test_beams_stay_in_their_buffers(self, model):
        cache = model._graph.new_cache(3, 100)
        model(torch.stack(prompts([9, 9, 9])), past_key_values=cache)
        places = {name: tensor.data_ptr() for name, tensor in cache.tensors.items()}
        before = {name: tensor.clone() for name, tensor in cache.tensors.items()}
        cache.reorder_cache(torch.tensor([1, 1, 0]))
        assert {name: tensor.data_ptr() for name, tensor in cache.tensors.items()} == places
        for name, tensor in cache.tensors.items():
            columns = (slice(None), slice(None), slice(0, 9)) if name not in cache.spare else (slice(None),)
            assert torch.equal(tensor[columns], before[name][[1, 1, 0]][columns])


def test_changed_settings_are_saved_as_changed(exported, tmp_path):
    model = ORTModelForCausalLM.from_pretrained(exported("trained"))
    model.generation_config.max_new_tokens = 17
    model.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 17
    assert "17" in (tmp_path / "generation_config.json").read_text()

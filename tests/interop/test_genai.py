"""onnxruntime-genai runs an exported folder without changes and gives the tokens of transformers alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from clients import END, FLOAT32, MESSAGES, NEW, PRECISIONS, up_to_end
from optimum.exporters.onnx import main_export

from optimum_lfm2.quality.quantize_cache import quantize_cache


og = pytest.importorskip(
    "onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install onnxruntime-genai"
)

# The graphs of both releases are the same, node for node: tests/export/test_graph_digests.py.
pytestmark = pytest.mark.once

HELD_OUT = Path(__file__).parents[2] / "demo" / "heldout.txt"
PAD = 0
MAX_LENGTH = 512


@pytest.fixture(scope="module", params=PRECISIONS)
def precision(request):
    return PRECISIONS[request.param]


@pytest.fixture
def folder(precision, exported):
    return exported("trained", **precision.export)


@pytest.fixture
def model(folder):
    return og.Model(str(folder))


@pytest.fixture
def assert_right(precision, folder, plain, gold_continuation):
    """`assert_right(ids, tokens)` compares tokens up to the end of the turn, which onnxruntime-genai leaves out."""

    def assert_right(ids: list[int], tokens: list[int]) -> None:
        plain(folder / "model.onnx").assert_greedy(ids, tokens, precision.rounded)
        if precision is PRECISIONS["fp32"]:
            assert tokens == up_to_end(gold_continuation(ids, NEW))

    return assert_right


def make_generator(model, batch_size: int = 1):
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=MAX_LENGTH, batch_size=batch_size)
    return og.Generator(model, params)


def run(generator, count: int = NEW) -> None:
    for _ in range(count):
        if generator.is_done():
            break
        generator.generate_next_token()


def new_tokens(generator, row: int, columns: int) -> list[int]:
    """Return the tokens of a row after `columns`. The end of turn is added where the answer ended by itself."""
    tokens = generator.get_sequence(row)[columns:].tolist()
    ended = generator.is_done() and END not in tokens
    return [*tokens, END] if ended else up_to_end(tokens)


def test_rows_alone(model, folder, precision, plain, prompt_ids, assert_right):
    for ids in prompt_ids:
        generator = make_generator(model)
        generator.append_tokens(ids)
        logits = np.asarray(generator.get_logits(), np.float32)[0, -1]
        expected = plain(folder / "model.onnx").logits(ids)[-1]
        np.testing.assert_allclose(logits, expected, atol=precision.rounded, rtol=0)
        run(generator)
        assert_right(ids, new_tokens(generator, 0, len(ids)))


def test_a_batch_padded_on_the_right(model, prompt_ids, assert_right):
    columns = max(map(len, prompt_ids))
    generator = make_generator(model, len(prompt_ids))
    generator.append_tokens(np.array([ids + [PAD] * (columns - len(ids)) for ids in prompt_ids], np.int32))
    run(generator)
    for row, ids in enumerate(prompt_ids):
        assert_right(ids, new_tokens(generator, row, columns))


def test_a_chat_goes_on_with_append_tokens(model, tokenizer, assert_right):
    generator, history = make_generator(model), []
    for message in MESSAGES:
        turn = [{"role": "user", "content": message}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        # onnxruntime-genai drops the end of the previous turn and its line break, so they are added here. The first id
        # of the new turn is the start of a text, and is left out.
        new = [END, *tokenizer("\n", add_special_tokens=False)["input_ids"], *ids[1:]] if history else ids
        generator.append_tokens(new)
        history += new
        run(generator)
        answer = new_tokens(generator, 0, len(history))
        assert answer[-1] == END, "the turn must end by itself"
        assert_right(history, answer)
        history += answer[:-1]
        assert generator.get_sequence(0).tolist() == history


def test_a_prompt_in_pieces_is_the_prompt(exported, long_ids):
    """Its own `chunk_size` has no effect on this type of model (0.18), so docs/deploy.md cuts prompts like this."""
    model, found = og.Model(str(exported("trained"))), []
    for size in (len(long_ids), 16, 7):
        generator = make_generator(model)
        for start in range(0, len(long_ids), size):
            generator.append_tokens(long_ids[start : start + size])
        found.append(np.asarray(generator.get_logits(), np.float32))
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=FLOAT32, rtol=0)


def test_a_cache_of_8_bits(exported, tmp_path, prompt_ids, gold_continuation):
    folder = shutil.copytree(exported("trained"), tmp_path / "export")
    _, target, _ = quantize_cache(folder, HELD_OUT, chunks=8, length=128)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = target.name
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "model.onnx").unlink()  # only the new file can run now
    model = og.Model(str(folder))
    for ids in prompt_ids:
        generator = make_generator(model)
        generator.append_tokens(ids)
        run(generator)
        assert new_tokens(generator, 0, len(ids)) == up_to_end(gold_continuation(ids, NEW))


def test_the_benchmark_runs_our_folder(exported, prompt_ids, gold_continuation):
    from benchmarks.systems import SYSTEMS

    system = SYSTEMS["ours-genai-fp32"].load(exported("trained"), threads=1, length=MAX_LENGTH)
    gold = up_to_end(gold_continuation(prompt_ids[0], NEW))[:-1]  # it goes on after the end of the answer
    assert len(gold) > 4
    assert system.run(prompt_ids[0], len(gold) - 1).tokens == gold


def test_the_graph_differs_in_its_logits_alone(folder):
    """Its inputs and outputs are those of the folder's own graph. Its nodes stand in an order in which they can run."""
    own, theirs = (ir.load(folder / name).graph for name in ("model.onnx", "genai_decoder.onnx_graph"))
    known = {*theirs.inputs, *theirs.initializers.values(), None}
    for node in theirs:
        assert known.issuperset(node.inputs), node.name
        known.update(node.outputs)
    assert [value.name for value in theirs.outputs] == [value.name for value in own.outputs]
    assert theirs.outputs[0].shape[1] == 1
    assert [value.name for value in theirs.inputs] == [x.name for x in own.inputs if x.name != "num_logits_to_keep"]


def test_the_length_of_a_text_is_bounded_unless_asked_for(checkpoint, tmp_path):
    """Keys and values have one buffer of `max_length`, which onnxruntime-genai zeroes."""
    source = shutil.copytree(checkpoint("trained"), tmp_path / "long")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128_000}))
    main_export(str(source), tmp_path / "export", do_validation=False)
    model = og.Model(str(tmp_path / "export"))
    ids = [8] * 8193
    with pytest.raises(Exception, match="exceeds max length"):
        og.Generator(model, og.GeneratorParams(model)).append_tokens(ids)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=8200)
    og.Generator(model, params).append_tokens(ids)


def test_what_the_readme_says_it_cannot_do(exported, prompt_ids, gold_continuation):
    model = og.Model(str(exported("trained")))
    generator = make_generator(model)
    generator.append_tokens(prompt_ids[0])
    run(generator, 3)
    with pytest.raises(Exception, match="RewindTo is currently not supported"):
        generator.rewind_to(5)
    stopped = generator.get_sequence(0).tolist()
    generator.append_tokens(prompt_ids[1])  # the last token of an answer that has not ended gets no keys and values
    again = make_generator(model)
    again.append_tokens(stopped + prompt_ids[1])
    assert np.abs(generator.get_logits() - again.get_logits()).max() > 0.01

    batch = make_generator(model, 2)
    batch.append_tokens(np.array([prompt_ids[0]] * 2, np.int32))
    run(batch)
    with pytest.raises(Exception, match="can only be called once for batch_size > 1"):
        batch.append_tokens(np.array([prompt_ids[0]] * 2, np.int32))

    columns = max(map(len, prompt_ids))
    left = make_generator(model, len(prompt_ids))
    left.append_tokens(np.array([[PAD] * (columns - len(ids)) + ids for ids in prompt_ids], np.int32))
    run(left)
    # The prompt is a sum, and the left-padded row gives a wrong one.
    assert new_tokens(left, 0, columns) != up_to_end(gold_continuation(prompt_ids[0], NEW))

"""`optimum-cli lfm2 quantize-cache`: the graph's results, independent rows, failures that leave the folder alone."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import gold_tokens
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.systems import loop, ours
from optimum_lfm2 import compat
from optimum_lfm2.caches import VALUE, CacheTensor, GrowingColumns
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.staging import staged
from optimum_lfm2.quality import quantize_cache
from optimum_lfm2.quality.evaluate import evaluate, read_chunks
from optimum_lfm2.quality.scoring import OnnxModel


DEMO = Path(__file__).parents[2] / "demo"
TEXT = DEMO / "heldout.txt"
SHORT = {"chunks": 8, "length": 128}
NEW = 24
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
EXPORTS = {
    "fp16": {"dtype": "fp16"},
    "q4": {"_variant": "q4"},
    "genai_names": {"model_kwargs": {"cache_names": "genai"}},
}


@pytest.fixture(scope="module")
def folder(exported, tmp_path_factory) -> Path:
    """A copy of an export, to which the file with the 8-bit KV cache was added."""
    folder = shutil.copytree(exported("trained"), tmp_path_factory.mktemp("kv8") / "export")
    quantize_cache.quantize_cache(folder, TEXT, **SHORT)
    return folder


@pytest.fixture
def model(folder):
    return ORTModelForCausalLM.from_pretrained(folder, file_name="model_kv8.onnx")


@pytest.fixture(scope="module")
def gold():
    return AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rows() -> list[torch.Tensor]:
    """Pieces of the text, of unequal length."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    ids = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8")[:4000], add_special_tokens=False).input_ids)
    return [ids[:60], ids[300:309], ids[500:533]]


def pad(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), 9), torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def scales(folder: Path) -> dict[str, torch.Tensor]:
    graph = ir.load(folder / "model_kv8.onnx").graph
    found = {name: value.const_value for name, value in graph.initializers.items() if name.endswith(".scale")}
    return {name: torch.from_numpy(np.array(tensor.numpy())) for name, tensor in found.items()}


@torch.no_grad()
def test_it_computes_attention_over_rounded_keys_and_values(folder, model, gold, rows, monkeypatch):
    """The gold is transformers with keys and values rounded by the file's scales, one scale per channel."""
    ids = rows[0][None]
    plain = gold(input_ids=ids, use_cache=True)
    cache, table = type(plain[compat.CACHE]), scales(folder)
    original = cache.update

    def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
        step = table[name].reshape(1, x.shape[1], 1, x.shape[3])
        return (x / step).round().clamp(-128, 127) * step

    def update(self, key, value, layer_idx, *args, **kwargs):
        key, value = rounded(key, f"present.{layer_idx}.key.scale"), rounded(value, f"present.{layer_idx}.value.scale")
        return original(self, key, value, layer_idx, *args, **kwargs)

    monkeypatch.setattr(cache, "update", update)
    expected = gold(input_ids=ids, use_cache=True).logits
    own = model(input_ids=ids).logits
    far, near = (expected - plain.logits).abs().mean(), (expected - own).abs().mean()
    assert near < far / 10, "rounding is all that differs"


def test_tokens_are_those_of_transformers_alone_and_weights_are_shared(folder, model, gold, rows):
    for row in rows:
        tokens = model.generate(row[None], **GREEDY)[0, len(row) :].tolist()
        assert tokens == gold_tokens(gold, row, NEW)
    assert {dtype for name, dtype in model.layout.dtypes.items() if "key" in name or "value" in name} == {torch.int8}
    assert model.layout.in_place
    files = {path.name for path in folder.glob("*.onnx*")}
    assert files == {"genai_decoder.onnx_graph", "model.onnx", "model.onnx_data", "model_kv8.onnx"}
    assert (folder / "model_kv8.onnx").stat().st_size < (folder / "model.onnx_data").stat().st_size / 10


@pytest.mark.parametrize("io_binding", [True, False])
def test_a_row_gets_what_it_gets_alone(io_binding, model, rows, monkeypatch):
    model.use_io_binding = io_binding
    alone = [model.generate(row[None], **GREEDY)[0, len(row) :].tolist() for row in rows]
    assert model.generate(**pad(rows, "left"), **GREEDY)[:, 60:].tolist() == alone
    assert model.generate(**pad(rows, "left"), prefill_chunk_size=7, **GREEDY)[:, 60:].tolist() == alone
    monkeypatch.setattr("optimum_lfm2.runtime.rows.PREFILL_CHUNK", 11)
    assert model.generate(**pad(rows, "left"), **GREEDY)[:, 60:].tolist() == alone

    batch = pad(rows, "right")  # then decode from its cache
    out = model(**batch)
    tokens = out.logits[torch.arange(3), batch["attention_mask"].sum(1) - 1].argmax(-1)
    taken, mask = [tokens], batch["attention_mask"]
    while len(taken) < NEW:
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
        out = model(input_ids=taken[-1][:, None], attention_mask=mask, **{compat.CACHE: out[compat.CACHE]})
        taken.append(out.logits[:, -1].argmax(-1))
    assert torch.stack(taken, 1).tolist() == alone


def test_chats_and_beams(model, gold, rows):
    first = model.generate(rows[1][None], return_dict_in_generate=True, **GREEDY)
    chat = torch.cat([first.sequences[0], rows[2]])
    went_on = model.generate(chat[None], **{compat.CACHE: copy.deepcopy(first[compat.CACHE])}, **GREEDY)
    assert went_on.tolist() == model.generate(chat[None], **GREEDY).tolist()
    assert went_on[0, len(chat) :].tolist() == gold_tokens(gold, chat, NEW)
    beams = {**GREEDY, "num_beams": 3}
    alone = [model.generate(row[None], **beams)[0, len(row) :].tolist() for row in rows]
    assert model.generate(**pad(rows, "left"), **beams)[:, 60:].tolist() == alone


@pytest.mark.parametrize("name", EXPORTS)
def test_every_kind_of_export(name, tmp_path, rows):
    main_export(str(DEMO / "checkpoint"), tmp_path, do_validation=False, **EXPORTS[name])
    quantize_cache.quantize_cache(tmp_path, TEXT, **SHORT)
    quality = evaluate(tmp_path / "model_kv8.onnx", tmp_path / "model.onnx", TEXT, **SHORT)
    assert 0 < quality.kl_divergence < 1e-3
    assert quality.top1_agreement > 0.99
    model = ORTModelForCausalLM.from_pretrained(tmp_path, file_name="model_kv8.onnx")
    out = model.generate(rows[0][None], **GREEDY)  # decoding token by token must agree with one call
    assert model(input_ids=out[:, :-1]).logits[:, -NEW:].argmax(-1).tolist() == out[:, -NEW:].tolist()
    assert len(out[0, -NEW:].unique()) > NEW // 3


def test_experts(experts_folder, tmp_path):
    shutil.copytree(experts_folder, tmp_path / "experts")
    text = tmp_path / "text"
    text.write_text("qjxzvkqzxj" * 20)  # these letters never merge into a longer token, and the model has only 256 ids
    source = tmp_path / "experts" / "onnx" / "model_q4.onnx"
    _, _, quality = quantize_cache.quantize_cache(source, text, chunks=6, length=32)
    assert 0 < quality.kl_divergence < 1e-2


def test_notes_about_the_other_file_are_not_copied(hub_folder, tmp_path):
    shutil.copytree(hub_folder, tmp_path / "hub")
    source = tmp_path / "hub" / "onnx" / "model_q4.onnx"
    _, target, _ = quantize_cache.quantize_cache(source, TEXT, **SHORT)
    assert target.name == "model_q4_kv8.onnx"
    before, after = (ir.load(path).metadata_props for path in (source, target))
    assert {"optimum_lfm2.difference", "optimum_lfm2.quality"} <= before.keys()
    assert before.keys() - after.keys() == {
        f"optimum_lfm2.{x}" for x in ("difference", "compared", "quality", "quality_text")
    }


def test_a_failure_leaves_the_folder(folder, tmp_path, monkeypatch):
    other = shutil.copytree(folder, tmp_path / "export")
    before = {path: path.read_bytes() for path in other.iterdir()}

    for error in (Lfm2Error, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(quantize_cache, "measure", fail)
        with pytest.raises(error):
            quantize_cache.quantize_cache(other, TEXT, **SHORT)
    monkeypatch.setattr(Path, "touch", lambda self: self.with_name("nowhere").joinpath("file").write_text(""))
    with pytest.raises(Lfm2Error, match=r"model_kv8.onnx cannot be written \(.*Copy the export"):
        quantize_cache.quantize_cache(other, TEXT, **SHORT)
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    with pytest.raises(Lfm2Error, match=r"1\.26\.0 cannot run an 8-bit KV cache\. Install 1\.27"):
        quantize_cache.quantize_cache(other, TEXT, **SHORT)
    assert {path: path.read_bytes() for path in other.iterdir()} == before


def test_an_export_that_is_written_anew_meanwhile(folder, tmp_path, monkeypatch):
    """The new graph would read the old cache's scales over other weights."""
    other, measure = shutil.copytree(folder, tmp_path / "export"), quantize_cache.measure
    (other / "model_kv8.onnx").unlink()

    def exported_anew(*args):
        status = (other / "model.onnx_data").stat()
        os.utime(other / "model.onnx_data", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        return measure(*args)

    monkeypatch.setattr(quantize_cache, "measure", exported_anew)
    with pytest.raises(Lfm2Error, match="was written anew meanwhile"):
        quantize_cache.quantize_cache(other, TEXT, **SHORT)
    assert not list(other.glob("*kv8*"))


def test_weights_that_are_links_are_refused(folder, tmp_path):
    """The Hub's cache consists of links. `tests/test_claims.py` shows which of them onnxruntime follows."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "model_kv8.onnx").unlink()
    with pytest.raises(Lfm2Error, match=r"model.onnx_data is a symbolic link.*--local-dir"):
        quantize_cache.quantize_cache(snapshot, TEXT, **SHORT)
    assert not list(snapshot.glob("*kv8*"))


def test_it_goes_with_the_file_that_it_was_made_of(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "export")
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(RuntimeError), staged(other) as new:
        (new / "model.onnx").write_bytes(b"other")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    with staged(other) as new:
        (new / "model_q4.onnx").write_bytes(b"other")
    assert (other / "model_kv8.onnx").exists()
    with staged(other) as new:
        (new / "model.onnx").write_bytes(b"other")
    assert {path.name for path in other.iterdir()} == before.keys() - {"model_kv8.onnx"} | {"model_q4.onnx"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("odd_head_dim", {}, "does not pass past_key_values.2.key directly to GroupQueryAttention"),
        ("all_conv", {}, "no KV cache among its inputs"),
        ("hybrid", {"task": "text-generation"}, "no KV cache among its inputs"),
    ],
)
def test_exports_without_such_a_cache(name, options, message, exported):
    with pytest.raises(Lfm2Error, match=message):
        quantize_cache.quantize_cache(exported(name, **options), TEXT)


def test_bad_input(folder, tmp_path):
    for model, options, message in [
        (tmp_path / "nowhere", {}, "nowhere does not exist"),
        (tmp_path, {}, "holds no ONNX file"),
        (TEXT, {}, "cannot be loaded"),
        (folder / "model_kv8.onnx", {}, r"has an 8-bit KV cache already\. Give the file"),
        (folder, {"chunks": 3}, "3 chunks are too few. Ask for 4"),
        (folder, {"length": 10_000}, "3 chunks of 10000 tokens, and 4 are needed"),
    ]:
        with pytest.raises(Lfm2Error, match=message):
            quantize_cache.quantize_cache(model, TEXT, **options)


def test_values_that_are_not_finite_are_refused():
    class Model:
        def run(self, names, ids):
            return [np.full((1, 1, 4, 8), np.inf, np.float32)]

    tensor = CacheTensor(0, VALUE, "past", "present", GrowingColumns((1, None, 8)))
    with pytest.raises(Lfm2Error, match="present has values that are not finite"):
        quantize_cache._calibrate(Model(), [tensor], [torch.zeros(1, 4)])


def test_scales_bound_what_the_text_showed(folder, model):
    heads, half = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads // 2
    table, source = scales(folder), OnnxModel(folder / "model.onnx")
    shown = read_chunks(TEXT, AutoTokenizer.from_pretrained(folder), **SHORT)[::2]
    names = [name.removesuffix(".scale") for name in table]
    for ids in shown:
        for name, (values,) in zip(names, source.run(names, ids), strict=True):
            largest = np.abs(values).max(1).ravel() * quantize_cache.HEADROOM
            assert (largest <= 127.01 * table[f"{name}.scale"].numpy()).all()
    for name in names:
        first, second = table[f"{name}.scale"].reshape(heads, 2, half).unbind(1)
        assert torch.equal(first, second) == name.endswith("key"), "positions turn a key's halves into one another"


def test_channels_that_the_text_never_used_have_a_scale():
    scales = quantize_cache._scales(np.array([[0, 2.0]], np.float32))
    np.testing.assert_allclose(scales, np.array([0.002, 2]) * quantize_cache.HEADROOM / 127, rtol=1e-6)
    assert quantize_cache._scales(np.zeros((1, 2), np.float32)).min() > 0


def test_a_folder_stands_for_the_float_cache(folder, tmp_path):
    evaluate(folder, folder, TEXT, chunks=2, length=32)
    other = shutil.copytree(folder, tmp_path / "export")
    (other / "model.onnx").rename(other / "model_q4.onnx")
    (other / "model_kv8.onnx").rename(other / "model_q4_kv8.onnx")
    assert torch.int8 not in ORTModelForCausalLM.from_pretrained(other).layout.dtypes.values()
    (other / "model_q4.onnx").unlink()
    assert torch.int8 in ORTModelForCausalLM.from_pretrained(other).layout.dtypes.values()


def test_through_optimum_cli(exported, cli_said, tmp_path):
    shutil.copytree(exported("trained"), tmp_path / "export")
    command = ("lfm2", "quantize-cache", tmp_path / "export", "--text", TEXT, "--chunks", 4, "--length", 64)
    code, out, err = cli_said(*command)
    assert code == 0, err
    assert "model_kv8.onnx: KL divergence from model.onnx" in out
    assert 'from_pretrained("' in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith('file_name="model_kv8.onnx")')
    code, _, err = cli_said(*command, "--length", 100000)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"optimum-cli: error: {TEXT} has")


def test_the_benchmarks_systems(tmp_path):
    ours.prepare(DEMO / "checkpoint", tmp_path, "q4-kv8")
    one, other = (module.System(tmp_path, 1, 64, "q4-kv8") for module in (ours, loop))
    assert torch.int8 in one.model.layout.dtypes.values()
    assert "tensor(int8)" in {value.type for value in other.session.get_inputs()}
    tokens = one.run(list(range(20, 40)), 8).tokens
    assert tokens == other.run(list(range(20, 40)), 8).tokens
    assert len(tokens) == 9

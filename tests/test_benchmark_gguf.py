"""The benchmark of GGUF files against llama.cpp. Where llama.cpp is not installed, its row cannot be made."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file
from tables import cells
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import gguf_kl, llama_server, servers
from benchmarks.checkpoint import TOKENIZER, add_tokenizer, spell_out
from benchmarks.gguf_architectures import Granite
from benchmarks.gguf_files import MIXES, token_of, tokenizer_of, write_gguf
from benchmarks.systems.llama import LlamaCpp


pytestmark = pytest.mark.once

# The kinds that `gguf` itself can write. Elsewhere ggml's quantiser does.
LIBRARY = {"Q6_K": "Q8_0", "Q4_K": "Q5_0"}


def by_library(values, kind):
    return quants.quantize(values, kind)


def test_the_gold_is_the_checkpoint_as_the_file_has_it(tmp_path):
    """A file in float has the checkpoint's weights; one in codes has other ones, near them."""
    logits = {}
    for kind in ("F32", "Q8_0", "Q4_0"):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(TOKENIZER, path, lambda name, width, kind=kind: kind, by_library)
        with torch.no_grad():
            logits[kind] = gguf_kl.gold_of(TOKENIZER, path)(torch.tensor([gguf_kl.prompts("demo", 1)[0]])).logits
    far = {kind: float((value - logits["F32"]).norm() / logits["F32"].norm()) for kind, value in logits.items()}
    assert 0 == far["F32"] < far["Q8_0"] < 0.02 < far["Q4_0"] < 0.3


@pytest.mark.parametrize("mix", MIXES)
def test_the_types_of_a_file(mix, tmp_path):
    """Rows of 128 values have no type of 256: llama.cpp then takes the next one."""
    path = tmp_path / "x.gguf"
    kinds = {}

    def kind(name: str, width: int) -> str:
        kinds[name] = MIXES[mix](name, width)
        return LIBRARY.get(kinds[name], kinds[name])

    write_gguf(TOKENIZER, path, kind, by_library, factors={"attn_q_norm": 5})
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_gate.weight"] == {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "Q4_K_M": "Q5_0"}[mix]
    assert kinds["blk.1.ffn_down.weight"] == {"Q4_0": "Q4_0", "Q8_0": "Q8_0", "Q4_K_M": "Q4_K"}[mix]
    norms = {tensor.name: tensor for tensor in GGUFReader(path).tensors if "norm" in tensor.name}
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in norms.values())
    assert norms["blk.2.attn_q_norm.weight"].data.mean() > 3 * norms["blk.2.attn_k_norm.weight"].data.mean()


def read_back(path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the metadata and the tensors of a file in float."""
    reader = GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {t.name: t.data for t in reader.tensors}


def test_a_file_of_granite(checkpoint, tmp_path):
    """Each factor is a key of its own, and tensors have the forms of llama.cpp's converter."""
    folder = checkpoint("granite")
    write_gguf(folder, tmp_path / "x.gguf")
    keys, tensors = read_back(tmp_path / "x.gguf")
    own, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert keys["general.architecture"] == "granitehybrid"
    of = {key.removeprefix("granitehybrid."): value for key, value in keys.items()}
    scales = [of[key] for key in ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")]
    factors = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    assert scales == pytest.approx([config[name] for name in factors])
    assert of["attention.head_count_kv"] == [0, 2, 0, 0, 2]
    assert of["rope.scaling.finetuned"] is False
    assert [of[f"ssm.{key}"] for key in ("inner_size", "time_step_rank", "group_count")] == [128, 8, 1]
    mamba = "model.layers.0.mamba"
    np.testing.assert_allclose(tensors["blk.0.ssm_a"], -own[f"{mamba}.A_log"].exp()[:, None], rtol=1e-6)
    np.testing.assert_array_equal(tensors["blk.0.ssm_d"], own[f"{mamba}.D"][:, None])
    np.testing.assert_array_equal(tensors["blk.0.ssm_dt.bias"], own[f"{mamba}.dt_bias"])
    np.testing.assert_array_equal(tensors["blk.0.ssm_norm.weight"], own[f"{mamba}.norm.weight"][None])
    ((_, norm),) = Granite(config | {"mamba_n_groups": 2}).tensors(f"{mamba}.norm.weight", torch.arange(6))
    assert norm.tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(tensors["blk.0.ssm_conv1d.weight"], own[f"{mamba}.conv1d.weight"].squeeze(1))
    both = np.concatenate([tensors[f"blk.0.ffn_{part}.weight"] for part in ("gate", "up")])
    np.testing.assert_array_equal(both, own["model.layers.0.shared_mlp.input_linear.weight"])
    query, stored = own["model.layers.1.self_attn.q_proj.weight"], tensors["blk.1.attn_q.weight"]
    np.testing.assert_array_equal(stored[:3], query[[0, 8, 1]])  # a head's first rows, each with that of its half


def test_a_vocabulary_of_the_checkpoint(tmp_path):
    write_gguf(TOKENIZER, tmp_path / "x.gguf", vocabulary=tokenizer_of(TOKENIZER))
    keys, _ = read_back(tmp_path / "x.gguf")
    own = AutoTokenizer.from_pretrained(TOKENIZER)
    words = keys["tokenizer.ggml.tokens"]
    assert len(words) == 2048
    assert all(words[i] == word for word, i in own.get_vocab().items())
    kinds = keys["tokenizer.ggml.token_type"]
    assert {i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL} == set(own.all_special_ids) | {
        i for i, token in own.added_tokens_decoder.items() if token.special
    }
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 7)


def test_made_up_words_are_tokens_and_texts(tmp_path):
    """In the checkpoint as in the file: every id of the vocabulary has a word, and the word is that id."""
    config = json.loads((TOKENIZER / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 2100}))
    tokenizer = AutoTokenizer.from_pretrained(spell_out(add_tokenizer(tmp_path)))
    ids = [2048, 2099, 2050]
    text = tokenizer.decode(ids)
    assert text.count(" zq") == 3
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    words: list[str] = []
    writer = SimpleNamespace(**{name: lambda *_: None for name in dir(gguf.GGUFWriter) if name.startswith("add_")})
    writer.add_token_list = words.extend
    tokenizer_of(tmp_path)(writer, 2100)
    assert [words[i] for i in ids] == tokenizer.convert_ids_to_tokens(ids)


def test_a_word_stands_for_its_id(tmp_path):
    write_gguf(TOKENIZER, tmp_path / "x.gguf")
    keys, _ = read_back(tmp_path / "x.gguf")
    assert [token_of(word) for word in keys["tokenizer.ggml.tokens"]] == list(range(2048))


def test_the_divergences_of_a_row():
    gold = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64).log()
    own = torch.tensor([[0.25, 0.75], [0.75, 0.25]], dtype=torch.float64).log()
    first, second, same, texts = gguf_kl.row(gold, own, 1, 2).split(" | ")
    assert (first, second) == ("0.143841 ± 0.000000", "0.130812 ± 0.000000")
    assert (same, texts) == ("50.0%", "1 of 2")


def test_without_llama_cpp(monkeypatch, capsys):
    def missing(name: str) -> str:
        raise gguf_kl.PackageNotFoundError(name)

    monkeypatch.setattr(gguf_kl, "version", missing)
    with pytest.raises(SystemExit):
        gguf_kl.main([])
    assert "llama.cpp is not installed: pip install xllamacpp" in capsys.readouterr().err


def test_llama_cpp_and_an_export(tmp_path, capsys):
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    gguf_kl.main(["--work", str(tmp_path), "--models", "demo", "--files", "Q4_0", "--prompts", "4", "--new", "4"])
    rows = cells(capsys.readouterr().out.splitlines()[2:])
    far = {row[2]: float(row[3].split(" ")[0]) for row in rows}
    assert far["export, activations in float"] < 1e-6 < far["export"] < 1e-3
    assert far["llama.cpp"] < 1e-3
    assert rows[2][5:] == ["100.0%", "4 of 4"]


def test_granite_without_a_bias_is_refused(checkpoint):
    config = json.loads((checkpoint("granite") / "config.json").read_text())
    with pytest.raises(ValueError, match="segmentation fault where mamba_conv_bias is false"):
        Granite(config | {"mamba_conv_bias": False})


@pytest.mark.parametrize("name", ["granite", "hybrid"])
def test_llama_cpp_computes_what_transformers_does(name, checkpoint, tmp_path):
    """In float, at each position, and token for token."""
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    folder = checkpoint(name)
    write_gguf(folder, tmp_path / "x.gguf")
    llama = LlamaCpp(tmp_path / "x.gguf", threads=1, length=128)
    gold = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(2, gold.config.vocab_size, 48).tolist()
    found = torch.from_numpy(llama.logits(ids))
    timing = llama.run(ids, 6)
    with torch.no_grad():
        wanted = gold(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        after = gold(torch.tensor([ids + timing.tokens]), use_cache=False).logits[0, len(ids) - 1 : -1]
    assert (wanted.exp() * (wanted - found)).sum(-1).max() < 1e-4
    assert timing.tokens == after.argmax(-1).tolist()
    assert all(before < now for before, now in zip(timing.stamps, timing.stamps[1:], strict=False))


def test_llama_cpp_listens(tmp_path):
    """It reads a prompt as the checkpoint's tokenizer cuts it, and streams."""
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    command = f"{sys.executable} -m benchmarks.llama_server {TOKENIZER} {tmp_path / 'x.gguf'} --port {{port}} --rows 2"
    with (tmp_path / "log").open("w+b") as log, servers.running("llama.cpp", command, None, 30, log) as server:
        answer = json.loads(server._post({"prompt": " the silver key", "max_tokens": 4}).read())
        seconds, text = server.first_token(" the silver key", 4)
    own = AutoTokenizer.from_pretrained(TOKENIZER)(" the silver key").input_ids
    assert answer["usage"]["prompt_tokens"] == len(own)
    assert seconds > 0
    assert text == answer["choices"][0]["text"]


def test_llama_cpp_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit, match="pip install xllamacpp"):
        llama_server.main([str(TOKENIZER), str(tmp_path / "x.gguf"), "--port", "1"])

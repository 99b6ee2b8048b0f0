"""The benchmark of GGUF files against llama.cpp. Where llama.cpp is not installed, its row cannot be made."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGUFReader, quants
from tables import cells

from benchmarks import gguf_kl
from benchmarks.checkpoint import TOKENIZER
from benchmarks.gguf_files import MIXES, write_gguf


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
        write_gguf(TOKENIZER, path, lambda name, width, kind=kind: kind, by_library, words=True)
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

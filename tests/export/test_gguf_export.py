"""Exports of GGUF files: their codes are those of the file, and they compute what the dequantised model computes.

Where transformers reads the file too, its reading is the gold.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from checkpoints import ATTENTION, BASE, CONV, MOE, gold_tokens, prompts, vary
from gguf import GGUFReader, quants
from gguf_files import gguf_name, loaded, write_gguf
from publishing import run as publish
from transformers import Lfm2Config, Lfm2ForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from benchmarks.checkpoint import TOKENIZER
from optimum_lfm2 import ORTLfm2ForCausalLM
from optimum_lfm2.quality.evaluate import evaluate
from optimum_lfm2.validation.pieces import keep_activations_float
from optimum_lfm2.weights.blocks import Blocks, dequantize_tensor


# Rows of 256 values, so that each type can store them.
OWN = {
    **BASE,
    "hidden_size": 256,
    "intermediate_size": 256,
    "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 3,
    "layer_types": [CONV, ATTENTION, CONV],
}
NEW = 24


def as_distilled(name: str) -> str:
    """The types of LiquidAI's Q4_0 files."""
    return "Q6_K" if name.startswith(("token_embd", "output.")) else "Q4_0"


def mixed(name: str) -> str:
    """A type for each part, as in files that keep some parts in more bits. Query, key and value differ."""
    kinds = {"attn_q.": "Q4_0", "attn_k.": "F16", "attn_v.": "Q8_0", "ffn_gate": "Q5_0", "ffn_down": "Q6_K"}
    kinds |= {"in_proj": "Q3_K", "output.": "F32", "token_embd": "Q8_0"}
    return next((kind for part, kind in kinds.items() if part in name), "IQ4_XS")


def without_grids(name: str) -> str:
    return "Q6_K" if "ffn_down" in name or "token_embd" in name else "Q4_K"


FILES = {
    "distilled": (as_distilled, {}),
    "mixed": (mixed, {"tie_word_embeddings": False}),
    "without_grids": (without_grids, {}),
    "with_words": (as_distilled, {"vocab_size": 2048}),  # as the demo's tokenizer
}


def make(name: str, folder: Path) -> None:
    kinds, changes = FILES[name]
    torch.manual_seed(1)
    model = Lfm2ForCausalLM(Lfm2Config(**{**OWN, **changes})).eval()
    vary(model)
    write_gguf(model, folder / "model.gguf", kinds)


@pytest.fixture(scope="module")
def file(made_once):
    def file(name: str) -> Path:
        folder = made_once(f"gguf-{name}", lambda folder: (folder.mkdir(), make(name, folder)))
        return folder / "model.gguf"

    return file


def as_transformers_reads(path: Path, **changes) -> Lfm2ForCausalLM:
    empty = Lfm2ForCausalLM(Lfm2Config(**OWN, **changes))
    read = load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)
    config = {name: value for name, value in read["config"].items() if name != "rms_norm_eps"}
    return loaded(Lfm2ForCausalLM(Lfm2Config(**config)), {name: x.numpy() for name, x in read["tensors"].items()})


def export(run, path: Path, output: Path, *options: object) -> Path:
    code, error = run("export", "onnx", "--model", path, output, *options)
    assert code == 0, error
    return output


def in_float(folder: Path) -> onnxruntime.InferenceSession:
    """The graph with activations in float."""
    model = ir.load(folder / "model.onnx")
    keep_activations_float(model.graph)
    ir.save(model, folder / "in_float.onnx")
    return onnxruntime.InferenceSession(folder / "in_float.onnx")


def check_computes(folder: Path, gold, atol: float = 2e-4) -> None:
    """Logits of a prompt, and greedy tokens, are those of the gold."""
    in_float(folder)
    model = ORTLfm2ForCausalLM.from_pretrained(folder, file_name="in_float.onnx")
    (prompt,) = prompts([17])
    with torch.no_grad():
        wanted, own = gold(prompt[None]), model(prompt[None])
    torch.testing.assert_close(own.logits, wanted.logits, atol=atol, rtol=0)
    tokens = model.generate(prompt[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert tokens[0, 17:].tolist() == gold_tokens(gold, prompt, NEW)


def stored(folder: Path) -> dict[str, Blocks]:
    """How the file stores each weight that it has in codes."""
    found = {}
    for node in ir.load(folder / "model.onnx").graph:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            at = node.inputs[1 if node.op_type == "MatMulNBits" else 0].name
            attributes = node.attributes
            found[at] = Blocks(attributes.get_int("bits"), attributes.get_int("block_size"))
    return found


def check_codes(path: Path, folder: Path, kinds: set[str]) -> None:
    """Each weight that is stored in codes is, dequantised, that of the GGUF file, bit for bit."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    initializers = ir.load(folder / "model.onnx").graph.initializers
    seen = set()
    for packed, blocks in stored(folder).items():
        if packed not in initializers:
            continue  # a view of the table
        name = packed.rpartition(".q")[0]
        codes = torch.from_numpy(initializers[packed].const_value.numpy().copy())
        if blocks.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        scales = torch.from_numpy(initializers[f"{name}.scales"].const_value.numpy().copy())
        codes, width = codes.reshape(*scales.shape, -1), scales.shape[1] * blocks.block_size
        own = dequantize_tensor(codes, scales.float(), width, blocks)
        parts = name.split(".")
        names = [".".join([*parts[:-2], part, "weight"]) for part in parts[-2].split("+")]
        whole = []
        for one in names:
            tensor = tensors[gguf_name(one)]
            seen.add(tensor.tensor_type.name)
            whole.append(quants.dequantize(tensor.data, tensor.tensor_type))
        assert np.array_equal(own.numpy(), np.concatenate(whole)), name
    assert seen == kinds


def test_a_distilled_file(file, cli, tmp_path):
    path = file("distilled")
    folder = export(cli, path, tmp_path / "out")
    check_codes(path, folder, {"Q4_0", "Q6_K"})
    check_computes(folder, as_transformers_reads(path))
    tables = {name: blocks for name, blocks in stored(folder).items() if "embed_tokens" in name}
    assert set(tables.values()) == {Blocks(8, 16)}, "head and embedding share the table"
    config = transformers.AutoConfig.from_pretrained(folder)
    for name in ("vocab_size", "layer_types", "num_key_value_heads", "conv_L_cache", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(Lfm2Config(**OWN), name)
    assert "/" not in (folder / "config.json").read_text(), "no path of the folder that stood for the file"


def test_query_key_and_value_of_three_types(file, cli, tmp_path, caplog):
    path = file("mixed")
    with caplog.at_level(logging.WARNING):
        folder = export(cli, path, tmp_path / "out")
    assert "rounded again" not in caplog.text
    check_codes(path, folder, {"Q4_0", "Q8_0", "Q5_0", "Q6_K", "Q3_K", "IQ4_XS"})
    check_computes(folder, as_transformers_reads(path, tie_word_embeddings=False))


@pytest.mark.once
def test_what_has_no_grid_is_rounded_and_named(file, cli, tmp_path, caplog):
    path = file("without_grids")
    with caplog.at_level(logging.WARNING):
        folder = export(cli, path, tmp_path / "out")
    (said,) = [record.getMessage() for record in caplog.records if "rounded again" in record.getMessage()]
    assert "14 matrices of the type Q4_K were rounded again, to 8 bits in blocks of 32" in said
    assert "feed_forward.w1 (layers 0, 1, 2), " in said
    far = float(said.rpartition("by ")[2].split("%")[0])
    assert 0.01 < far < 1
    assert stored(folder)["model.layers.0.feed_forward.w2.weight.q8"] == Blocks(8, 16), "Q6_K is kept"


@pytest.mark.once
def test_a_variant_asks_for_fewer_bits(file, cli, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        folder = export(cli, file("mixed"), tmp_path / "out", "--variant", "q4")
    kinds = stored(folder)
    assert kinds["model.layers.1.self_attn.q_proj.weight.q4"] == Blocks(4, 32), "4 bits are kept"
    assert kinds["model.layers.1.self_attn.v_proj.weight.q4"] == Blocks(4, 128)
    assert "of the type Q8_0 were rounded again, to 4 bits in blocks of 128: self_attn.v_proj (layers 1)" in caplog.text


@pytest.mark.once
def test_the_variant_float_dequantises(file, cli, tmp_path):
    path = file("distilled")
    folder = export(cli, path, tmp_path / "out", "--variant", "float")
    assert not stored(folder)
    check_computes(folder, as_transformers_reads(path))


@pytest.mark.once
def test_half_precision_and_a_portable_embedding(file, cli, tmp_path):
    path = file("distilled")
    options = ("--dtype", "fp16", "--model-kwargs", '{"embedding": "portable"}')
    folder = export(cli, path, tmp_path / "out", *options)
    assert stored(folder)["model.layers.0.feed_forward.w2.weight.q4"] == Blocks(4, 32)
    gold, model = as_transformers_reads(path), ORTLfm2ForCausalLM.from_pretrained(folder)
    (prompt,) = prompts([17])
    with torch.no_grad():
        torch.testing.assert_close(model(prompt[None]).logits.float(), gold(prompt[None]).logits, atol=3e-2, rtol=0)


def test_from_pretrained(file):
    path = file("distilled")
    (prompt,) = prompts([17])
    for model in (
        ORTLfm2ForCausalLM.from_pretrained(path, export=True),
        ORTLfm2ForCausalLM.from_pretrained(path.parent, gguf_file=path.name, export=True),
    ):
        with torch.no_grad():
            gold = as_transformers_reads(path)(prompt[None]).logits
        assert (model(prompt[None]).logits - gold).norm() < 0.1 * gold.norm()  # activations in 8 bits
        assert model.generate(prompt[None], max_new_tokens=4).shape == (1, 21)


@pytest.mark.once
def test_a_folder_for_the_hub_and_its_quality(file, tmp_path):
    """The reference of the quality is the GGUF file itself."""
    path, folder = file("with_words"), tmp_path / "out"
    assert publish("--model", path, "--tokenizer", TOKENIZER, folder, "--precisions", "q4") == 0
    packed = ir.load(folder / "onnx" / "model_q4.onnx").graph.initializers
    assert "model.layers.0.feed_forward.w2.weight.q4" in packed
    for written in ("config.json", "README.md", "tokenizer_config.json"):
        assert "lfm2-gguf-" not in (folder / written).read_text(), "no path of the folder that stood for the file"
    quality = evaluate(folder / "onnx" / "model_q4.onnx", path, TOKENIZER.parent / "heldout.txt", chunks=2, length=32)
    assert 0 < quality.kl_divergence < 0.01, "activations in 8 bits, and weights that are the file's"


@pytest.mark.parametrize("down", ["Q4_0", "Q8_0"])
def test_experts(down, cli, tmp_path, caplog):
    """Their codes go over too. Where the two matrices of an expert differ, both are stored in 8 bits, one rounded."""
    if not hasattr(transformers, "Lfm2MoeConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no Lfm2Moe")
    options = {**OWN, **MOE}
    del options["block_auto_adjust_ff_dim"]
    config = transformers.Lfm2MoeConfig(**options)
    torch.manual_seed(1)
    model = transformers.Lfm2MoeForCausalLM(config).eval()
    vary(model)
    path = tmp_path / "x.gguf"

    def kinds(name: str) -> str:
        return down if "down_exps" in name else as_distilled(name)

    values = write_gguf(model, path, kinds, "lfm2moe")
    gold = loaded(transformers.Lfm2MoeForCausalLM(config), values)
    with caplog.at_level(logging.WARNING):
        folder = export(cli, path, tmp_path / "out")
    nodes = [node for node in ir.load(folder / "model.onnx").graph if node.op_type == "QMoE"]
    found = {
        Blocks(*(node.attributes.get_int(name) for name in ("expert_weight_bits", "block_size"))) for node in nodes
    }
    assert found == {Blocks(4 if down == "Q4_0" else 8, 32)}
    assert ("experts.gate_up_proj (layers 1, 2)" in caplog.text) == (down == "Q8_0")
    assert "down_proj" not in caplog.text
    in_float(folder)
    own = ORTLfm2ForCausalLM.from_pretrained(folder, file_name="in_float.onnx")
    (prompt,) = prompts([17])
    with torch.no_grad():
        wanted = gold(prompt[None]).logits
    if down == "Q4_0":
        torch.testing.assert_close(own(prompt[None]).logits, wanted, atol=2e-4, rtol=0)
        tokens = own.generate(prompt[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert tokens[0, 17:].tolist() == gold_tokens(gold, prompt, NEW)
    else:  # QMoE's 8 bits are a few percent off (docs/moe.md)
        assert (own(prompt[None]).logits - wanted).norm() < 0.1 * wanted.norm()

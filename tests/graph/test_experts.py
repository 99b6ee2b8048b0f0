"""Experts in the file: the router's corners, the operators, few bits, both forms of a checkpoint, memory."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from checkpoints import BASE, MOE, gold_tokens, make_checkpoint, prompts
from optimum.exporters.onnx import main_export, onnx_export_from_model
from optimum.onnxruntime import ORTModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.checkpoint import write_moe
from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.streamed import StandIns
from optimum_lfm2.export.validation import errors_as_they_are
from optimum_lfm2.graph import experts as graph_experts
from optimum_lfm2.weights import experts
from optimum_lfm2.weights.blocks import SCHEMES
from optimum_lfm2.weights.experts import whole


if compat.TRANSFORMERS_5:
    from transformers import Lfm2MoeConfig
    from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter

pytestmark = pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="transformers 4 has no lfm2_moe")

NEW = 32
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


def changed(checkpoint: Callable[..., Path], folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the checkpoint `moe` whose stored tensors `change` has been at."""
    path = shutil.copytree(checkpoint("moe"), folder / "changed")
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def equal_to_gold(source: Path, folder: Path) -> PreTrainedModel:
    gold = AutoModelForCausalLM.from_pretrained(source).eval()
    main_export(str(source), folder / "out", do_validation=False)
    model = ORTModelForCausalLM.from_pretrained(folder / "out")
    for row in prompts([9, 1, 30]):
        assert model.generate(row[None], **GREEDY)[0, len(row) :].tolist() == gold_tokens(gold, row, NEW)
    return gold


# The router


def test_scores_near_0_and_1(checkpoint, tmp_path):
    """Most scores are 1 to the last bit, or too small to tell from 0 in steps of 6e-8: only the bias chooses."""

    def change(tensors):
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name] *= 20

    equal_to_gold(changed(checkpoint, tmp_path, change), tmp_path)


@pytest.mark.parametrize("offset", [0.0, -16.0, -40.0, 40.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("count", "normalise", "factor"), [(1, True, 1.0), (4, True, 2.5), (3, False, 1.0)])
def test_router(count, normalise, factor, biased, offset, tmp_path):
    """Scores as small as the 1e-6 that transformers adds to their sum, or 1 to the last bit, too."""
    settings = {"norm_topk_prob": normalise, "routed_scaling_factor": factor, "use_expert_bias": biased}
    config = Lfm2MoeConfig(**BASE | MOE | settings | {"num_experts_per_tok": count, "num_experts": 16})
    generator = torch.Generator().manual_seed(0)
    router = Lfm2MoeTopKRouter(config)
    hidden, gate = (torch.randn(n, 64, generator=generator) / 4 for n in (40, 16))
    hidden[:, 0], gate[:, 0] = 1.0, offset
    router.weight = torch.nn.Parameter(gate, requires_grad=False)
    bias = torch.randn(16, generator=generator) if biased else None

    class Graph(torch.nn.Module):
        def forward(self, hidden):
            return graph_experts.route(hidden, gate, bias, count, normalise, factor)

    options = {"input_names": ["hidden"], "dynamic_axes": {"hidden": {0: "tokens"}}, "opset_version": 18}
    torch.onnx.export(Graph(), (hidden[:2],), tmp_path / "router.onnx", dynamo=False, **options)
    (shares,) = onnxruntime.InferenceSession(tmp_path / "router.onnx").run(None, {"hidden": hidden.numpy()})
    _, weights, chosen = router(hidden, bias)
    if offset == 40 and not biased:  # all scores are 1, and transformers leaves open which are chosen
        assert ((shares > 0).sum(1) == count).all()
        torch.testing.assert_close(torch.from_numpy(shares).sum(1), weights.sum(1))
    else:
        expected = torch.zeros(40, 16).scatter(1, chosen, weights)
        torch.testing.assert_close(torch.from_numpy(shares), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("twins", [2, 8])
def test_equal_scores(twins, checkpoint, tmp_path):
    """Twins have one score: whichever are chosen, each counts once. Transformers leaves open which."""

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("gate.weight", "expert_bias")):
                tensor[:] = tensor[::twins].repeat_interleave(twins, dim=0)
            elif match := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
                tensor[:] = tensors[f"{match[1]}{int(match[2]) // twins * twins}{match[3]}"]

    equal_to_gold(changed(checkpoint, tmp_path, change), tmp_path)


def test_experts_that_are_never_used(checkpoint, tmp_path):
    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("expert_bias"):
                tensor[:5] = -10.0
            if re.search(r"\.experts\.[0-4]\.", name):
                tensor[:] = 1e9  # a share of them that is not quite 0 would show

    equal_to_gold(changed(checkpoint, tmp_path, change), tmp_path)


# The file


def test_operators(exported):
    graph = ir.load(exported("moe") / "model.onnx").graph
    operators = [node.op_type for node in graph]
    assert operators.count("MoE") == operators.count("TopK") == 4
    assert operators.count("QMoE") == 0
    for variant, bits in (("q4", 4), ("q8", 8)):
        graph = ir.load(exported("moe", _variant=variant) / "model.onnx").graph
        nodes = [node for node in graph if node.op_type == "QMoE"]
        assert len(nodes) == 4
        for node in nodes:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            assert attributes == {
                "k": 2,
                "expert_weight_bits": bits,
                "block_size": 32,  # the experts are 32 wide
                "weights_prepacked": 0,
                "activation_type": "swiglu",
                "swiglu_fusion": 1,
                "accuracy_level": 4,
            }
        gates = [name for name in graph.initializers if "gate.weight" in name]
        assert len(gates) == 4
        assert all(graph.initializers[name].dtype == ir.DataType.FLOAT for name in gates)


@pytest.mark.parametrize("name", ["moe", "moe_odd", "moe_top_4"])
def test_4_bits_are_exact_but_for_int8_activations(name, exported, gold_model, tmp_path):
    """Without these, the tokens of transformers on the dequantised weights."""
    folder = shutil.copytree(exported(name, _variant="q4"), tmp_path / "float_activations")
    model = ir.load(folder / "model.onnx")
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    ir.save(model, folder / "model.onnx")
    gold = dequantized(gold_model(name), "q4")
    model = ORTModelForCausalLM.from_pretrained(folder)
    for row in prompts([9, 1, 30]):
        tokens = gold_tokens(gold, row, NEW)
        assert model.generate(row[None], **GREEDY)[0, len(row) :].tolist() == tokens
        assert tokens != gold_tokens(gold_model(name), row, NEW)


@pytest.mark.parametrize(
    "options", [{"_variant": "q4"}, {"_variant": "q8"}, {"_variant": "q4", "dtype": "fp16"}, {"dtype": "fp16"}]
)
@pytest.mark.parametrize("name", ["moe", "moe_odd", "moe_top_4"])
def test_the_graph_computes_with_the_dequantised_weights(name, options, exported, gold_model):
    model = ORTModelForCausalLM.from_pretrained(exported(name, **options))
    gold = dequantized(gold_model(name), options.get("_variant"))
    ids = torch.randint(8, 256, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = gold(input_ids=ids, use_cache=False).logits
    error = (model(ids).logits.float() - expected).pow(2).mean(-1).sqrt() / expected.pow(2).mean(-1).sqrt()
    # The median: where two experts are next to equal, the noise of int8 activations chooses between them.
    assert float(error.median()) < (0.12 if "_variant" in options else 0.01)


def dequantized(model: PreTrainedModel, variant: str | None) -> PreTrainedModel:
    values = StandIns(model, model.state_dict(), SCHEMES.get(variant))
    copy = type(model)(model.config).eval()
    copy.load_state_dict({name: whole(values[name]) for name in values})
    return copy


# The checkpoint


def packed(tensors: dict[str, torch.Tensor]) -> None:
    """As transformers holds them in memory."""
    for layer in range(1, 5):
        prefix = f"model.layers.{layer}.feed_forward.experts"
        parts = [[tensors.pop(f"{prefix}.{e}.{part}.weight") for e in range(8)] for part in ("w1", "w3", "w2")]
        gate, up, down = map(torch.stack, parts)
        tensors |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}


@pytest.mark.parametrize("variant", ["default", "q4"])
def test_packed_experts_give_the_same_file(variant, checkpoint, exported, tmp_path):
    main_export(str(changed(checkpoint, tmp_path, packed)), tmp_path / "out", do_validation=False, _variant=variant)
    one, other = (
        (path / "model.onnx_data").read_bytes() for path in (tmp_path / "out", exported("moe", _variant=variant))
    )
    assert one == other


def test_a_checkpoint_of_the_bare_decoder(gold_model, tmp_path):
    gold_model("moe").model.save_pretrained(tmp_path / "source")
    with errors_as_they_are():
        main_export(str(tmp_path / "source"), tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (row,) = prompts([30])
    with torch.no_grad():
        expected = gold_model("moe").model(input_ids=row[None], use_cache=False).last_hidden_state
    inputs = {"input_ids": row[None].numpy(), "attention_mask": np.ones((1, 30), dtype=np.int64)}
    np.testing.assert_allclose(session.run(None, inputs)[0], expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["default", "q4"])
def test_a_model_in_memory(variant, gold_model, exported, tmp_path):
    model = copy.deepcopy(gold_model("moe"))
    with errors_as_they_are():
        onnx_export_from_model(model, tmp_path, task="text-generation-with-past", _variant=variant)
    one, other = ((path / "model.onnx_data").read_bytes() for path in (tmp_path, exported("moe", _variant=variant)))
    assert one == other
    assert torch.equal(model.lm_head.weight, gold_model("moe").lm_head.weight), "validation gives the weights back"


def test_shards(checkpoint, exported, gold_model, tmp_path):
    gold_model("moe").save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 5
    main_export(str(tmp_path / "source"), tmp_path / "out", do_validation=False)
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (exported("moe") / "model.onnx_data").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.2.feed_forward.experts.5.w3.weight"), r"experts\.5\.w3"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name], "no tensor"),
        (lambda tensors: tensors.pop("model.layers.2.feed_forward.expert_bias"), "expert_bias"),
        (
            lambda tensors: tensors.update({"model.layers.1.feed_forward.experts.3.w2.weight": torch.ones(64, 31)}),
            r"experts\.3\.w2.*\(64, 31\).*\(64, 32\)",
        ),
        (lambda tensors: tensors["model.layers.1.feed_forward.experts.3.w2.weight"].fill_(torch.inf), r"s\.3\.w2"),
    ],
)
def test_a_checkpoint_that_is_not_whole(change, message, checkpoint, tmp_path):
    source = changed(checkpoint, tmp_path, change)
    with pytest.raises(Lfm2Error, match=message):
        main_export(str(source), tmp_path / "out")


def test_experts_too_narrow_for_few_bits(tmp_path):
    source = make_checkpoint("moe", tmp_path, moe_intermediate_size=24)
    main_export(str(source), tmp_path / "out", do_validation=False)
    with pytest.raises(Lfm2Error, match="multiples of 16"):
        main_export(str(source), tmp_path / "q4", do_validation=False, _variant="q4")


# Validation


@pytest.mark.parametrize(
    "options", [{}, {"_variant": "q4"}, {"_variant": "q8"}, {"dtype": "fp16"}, {"task": "feature-extraction"}]
)
def test_validation_passes(options, checkpoint, tmp_path):
    with errors_as_they_are():
        main_export(str(checkpoint("moe")), tmp_path, **options)


@pytest.mark.parametrize("shapes", [{"batch_size": 3, "sequence_length": 5}, {"batch_size": 2, "sequence_length": 1}])
def test_validation_of_several_rows(shapes, checkpoint, tmp_path):
    with errors_as_they_are():
        main_export(str(checkpoint("moe")), tmp_path, **shapes)


def _no_epsilon(monkeypatch):
    monkeypatch.setattr(graph_experts, "NORM_EPSILON", 0.1)


def _not_interleaved(monkeypatch):
    monkeypatch.setattr(graph_experts, "interleaved", lambda weight: weight)


def _one_expert_forgotten(monkeypatch):
    real = graph_experts._matrices
    monkeypatch.setattr(graph_experts, "_matrices", lambda *args: (m * (i != 3) for i, m in enumerate(real(*args))))


def _nibbles_swapped(monkeypatch):
    monkeypatch.setattr(experts, "pack", lambda codes, blocks: codes[..., 0::2] << 4 | codes[..., 1::2])


@pytest.mark.parametrize(
    ("mistake", "variant"),
    [
        (_no_epsilon, "default"),
        (_not_interleaved, "default"),
        (_not_interleaved, "q4"),
        (_one_expert_forgotten, "default"),
        (_one_expert_forgotten, "q8"),
        (_nibbles_swapped, "q4"),
    ],
)
def test_validation_finds(mistake, variant, checkpoint, tmp_path, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(Lfm2Error, match="The file is wrong"), errors_as_they_are():
        main_export(str(checkpoint("moe")), tmp_path, _variant=variant)


MEASURE = """
import resource, sys
import optimum_lfm2
import torch
from optimum.exporters.onnx import main_export, onnx_export_from_model
torch.set_num_threads(1)
peaks = []
for source, out in zip(sys.argv[1::2], sys.argv[2::2]):
    main_export(source, out, _variant="q4")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
print(*peaks)
"""


def test_memory_does_not_grow_with_experts_or_layers(tmp_path):
    """An expert is 3 MB in float32, a layer of the larger checkpoint 96 MB, and all of it is validated."""
    arguments = []
    for count, kinds in ((4, ["conv"] * 2), (32, ["conv"] * 4)):
        sizes = {
            "hidden_size": 512,
            "moe_intermediate_size": 512,
            "num_experts": count,
            "num_hidden_layers": len(kinds),
        }
        config = Lfm2MoeConfig(**BASE | MOE | sizes | {"layer_types": kinds})
        arguments += [write_moe(tmp_path / f"{count}", config), tmp_path / f"{count}_onnx"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 48

"""Experts in the graph: hard cases of the router, the operators, few bits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from checkpoints import BASE, MOE, changed_copy, gold_tokens, make_checkpoint, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph import experts as graph_experts
from optimum_lfm2.validation.streamed import StandIns
from optimum_lfm2.weights.blocks import scheme_of
from optimum_lfm2.weights.experts import ExpertWeights


if compat.TRANSFORMERS_5:
    from transformers import Lfm2MoeConfig
    from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter

pytestmark = pytest.mark.skipif(not compat.TRANSFORMERS_5, reason="transformers 4 has no lfm2_moe")

NEW = 32
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


def equal_to_gold(source: Path, folder: Path) -> PreTrainedModel:
    gold = AutoModelForCausalLM.from_pretrained(source).eval()
    main_export(str(source), folder / "out", do_validation=False)
    model = ORTModelForCausalLM.from_pretrained(folder / "out")
    for row in prompts([9, 1, 30]):
        assert model.generate(row[None], **GREEDY)[0, len(row) :].tolist() == gold_tokens(gold, row, NEW)
    return gold


# The router


def test_scores_near_0_and_1(checkpoint, tmp_path):
    """Most scores are exactly 1, or below the 6e-8 by which `Sigmoid` may be wrong. So only the bias decides."""

    def change(tensors):
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name] *= 20

    equal_to_gold(changed_copy(checkpoint("moe"), tmp_path, change), tmp_path)


@pytest.mark.parametrize("offset", [0.0, -16.0, -40.0, 40.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("count", "normalise", "factor"), [(1, True, 1.0), (4, True, 2.5), (3, False, 1.0)])
def test_router(count, normalise, factor, biased, offset, tmp_path):
    """Some scores are as small as the 1e-6 that transformers adds to their sum, and some are exactly 1."""
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
    """Twin experts have equal scores and weights. transformers leaves open which is chosen; each must count once."""

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith(("gate.weight", "expert_bias")):
                tensor[:] = tensor[::twins].repeat_interleave(twins, dim=0)
            elif match := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
                tensor[:] = tensors[f"{match[1]}{int(match[2]) // twins * twins}{match[3]}"]

    equal_to_gold(changed_copy(checkpoint("moe"), tmp_path, change), tmp_path)


def test_experts_that_are_never_used(checkpoint, tmp_path):
    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("expert_bias"):
                tensor[:5] = -10.0
            if re.search(r"\.experts\.[0-4]\.", name):
                tensor[:] = 1e9  # a share of them that is not quite 0 would show

    equal_to_gold(changed_copy(checkpoint("moe"), tmp_path, change), tmp_path)


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
    """With activations in float, the tokens are those of transformers with the dequantised weights."""
    folder = shutil.copytree(exported(name, _variant="q4"), tmp_path / "float_activations")
    model = ir.load(folder / "model.onnx")
    for node in model.graph:
        node.attributes.pop("accuracy_level", None)
    ir.save(model, folder / "model.onnx")
    gold = dequantized(gold_model(name), {"_variant": "q4"})
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
    gold = dequantized(gold_model(name), options)
    ids = torch.randint(8, 256, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = gold(input_ids=ids, use_cache=False).logits
    error = (model(ids).logits.float() - expected).pow(2).mean(-1).sqrt() / expected.pow(2).mean(-1).sqrt()
    # The median: where two experts are next to equal, the noise of int8 activations chooses between them.
    assert float(error.median()) < (0.12 if "_variant" in options else 0.01)


def _whole(weight: torch.Tensor | ExpertWeights) -> torch.Tensor:
    return torch.stack(list(weight)) if isinstance(weight, ExpertWeights) else weight


def dequantized(model: PreTrainedModel, options: dict[str, str]) -> PreTrainedModel:
    scheme = scheme_of(options.get("_variant", ""), options.get("dtype", "fp32"))
    values = StandIns(model, model.state_dict(), scheme)
    copy = type(model)(model.config).eval()
    copy.load_state_dict({name: _whole(values[name]) for name in values})
    return copy


def test_experts_too_narrow_for_few_bits(tmp_path):
    source = make_checkpoint("moe", tmp_path, moe_intermediate_size=24)
    main_export(str(source), tmp_path / "out", do_validation=False)
    with pytest.raises(Lfm2Error, match="multiples of 16"):
        main_export(str(source), tmp_path / "q4", do_validation=False, _variant="q4")

"""Graphs of the members stay as they are, node for node, unless somebody means to change them.

A digest covers all that a file says but for the values of its weights: nodes, attributes, names, shapes, types, small
constants and metadata. After a change of a graph that is meant, run this file as a script with
`PYTHONPATH=.:tests/support`, on both releases of transformers. It writes `graph_digests.json` anew. Say in CHANGELOG.md
that files change. `test_weight_bytes.py` has the weights.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from copy import deepcopy
from pathlib import Path

import onnx_ir as ir
import pytest
from checkpoints import ATTENTION, CONV, DELTA, GRANITE_ATTENTION, MAMBA, SLIDING, make_checkpoint
from embedding import make_embedding
from lfm3_pictures import make_lfm3_vl
from pictures import make_vl_checkpoint

import optimum_lfm2  # noqa: F401  before Optimum's
from optimum_lfm2 import compat


# isort: split
from optimum.exporters.onnx import main_export


DIGESTS = Path(__file__).with_name("graph_digests.json")
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
TINY |= {"num_key_value_heads": 1, "layer_types": [CONV, ATTENTION, CONV]}
KWARGS = [
    {},
    {"variant": "q4"},
    {"variant": "q4s", "dtype": "fp16"},
    {"variant": "q8", "model_kwargs": {"embedding": "portable", "num_logits_to_keep": "required"}},
    {"model_kwargs": {"cache_names": "genai", "rollback": "columns"}},
]
LENGTH_OF_SMALL = 64  # values


def lines_of(graph: ir.Graph) -> list[str]:
    """Return the nodes of a graph as text, and those of the graphs that its nodes have."""
    lines = []
    for node in graph:
        attributes = {}
        for name, attribute in sorted(node.attributes.items()):
            value = attribute.value
            if attribute.type == ir.AttributeType.GRAPH:
                attributes[name] = [*lines_of(value), [output.name for output in value.outputs]]
            else:
                attributes[name] = value.numpy().tolist() if attribute.type == ir.AttributeType.TENSOR else value
        names = [[value.name if value is not None else None for value in side] for side in (node.inputs, node.outputs)]
        lines.append(f"{node.domain} {node.op_type} {node.name} {names} {attributes}")
    return lines


def text_of(path: Path) -> str:
    """Return all that a graph says but for the values of its weights, as text."""
    model = ir.load(path)
    graph = model.graph
    lines = [f"{model.ir_version} {sorted(model.opset_imports.items())} {sorted(model.metadata_props.items())}"]
    for kind, values in (("in", graph.inputs), ("out", graph.outputs)):
        lines += [f"{kind} {value.name} {value.dtype} {value.shape}" for value in values]
    for name, value in sorted(graph.initializers.items()):
        tensor = value.const_value
        small = tensor.numpy().tolist() if tensor.size <= LENGTH_OF_SMALL and tensor.dtype == ir.DataType.INT64 else ""
        lines.append(f"weight {name} {tensor.dtype} {list(tensor.shape)} {small}")
    lines += lines_of(graph)
    # The module `vision_model` is one that transformers 5 no longer has.
    return "\n".join(lines).replace("vision_tower.vision_model.", "vision_tower.")


def digest(path: Path) -> str:
    """Return a hash of `text_of`."""
    return hashlib.sha256(text_of(path).encode()).hexdigest()[:16]


def makers() -> dict:
    """For each member, a function that makes a checkpoint in a folder, and which of `KWARGS` it takes."""
    made = {
        "lfm2": (lambda folder: make_checkpoint("hybrid", folder, **TINY), KWARGS),
        "encoder": (lambda folder: make_embedding(folder / "embedding"), KWARGS[:2]),
        "lfm2_vl": (lambda folder: make_vl_checkpoint(folder / "vl"), KWARGS[:2]),
    }
    named = {"model_kwargs": {"cache_names": "genai"}}
    mamba = {**TINY, "layer_types": [MAMBA, GRANITE_ATTENTION, MAMBA], "mamba_n_heads": 4}
    made["granite"] = (lambda folder: make_checkpoint("granite", folder, **mamba), [*KWARGS[:2], named])
    if "olmo_hybrid" not in compat.STAND_INS:
        own = {**TINY, "layer_types": [DELTA, ATTENTION, DELTA]}
        made["olmo"] = (lambda folder: make_checkpoint("olmo", folder, **own), [KWARGS[0], KWARGS[3], named])
    if "lfm2_moe" not in compat.STAND_INS:
        made["lfm2_moe"] = (lambda folder: make_checkpoint("moe", folder, **TINY, num_experts=4), KWARGS)
    if "lfm3" not in compat.STAND_INS:
        layers = {**TINY, "layer_types": [CONV, SLIDING, ATTENTION]}
        made["lfm3"] = (
            lambda folder: make_checkpoint("lfm3", folder, **layers),
            [*KWARGS, {"model_kwargs": {"sliding_cache": "growing"}}],
        )
    if "lfm3_vl" not in compat.STAND_INS:
        made["lfm3_vl"] = (lambda folder: make_lfm3_vl(folder / "vl"), KWARGS[:2])
    return made


def digests(member: str, folder: Path) -> dict[str, str]:
    """Export a member in each way, and return the digest of each file."""
    make, ways = makers()[member]
    checkpoint = make(folder / "checkpoint")
    found = {}
    for number, way in enumerate(ways):
        out = folder / str(number)
        main_export(str(checkpoint), out, do_validation=False, **deepcopy(way))  # it adds to the kwargs
        found |= {f"{json.dumps(way)} {file.relative_to(out)}": digest(file) for file in sorted(out.rglob("*.onnx"))}
    return found


@pytest.mark.parametrize("member", makers())
def test_the_graphs_of_a_member_are_those_of_before(member, tmp_path):
    assert digests(member, tmp_path) == json.loads(DIGESTS.read_text())[member]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        new = {member: digests(member, Path(work, member)) for member in makers()}
    DIGESTS.write_text(json.dumps(json.loads(DIGESTS.read_text()) | new if DIGESTS.exists() else new, indent=1) + "\n")

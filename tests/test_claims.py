"""Claims about onnxruntime that the code relies on, one test each. All of them hold in onnxruntime 1.32 on a CPU.

When a test fails with a later release, the claim no longer holds. The test's docstring says what can go then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest


MICROSOFT = "com.microsoft"
OPSETS = {"": 18, MICROSOFT: 1}
HEADS, WIDTH = 2, 16


def save(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], path: Path, **constants) -> Path:
    """Save a graph of these nodes, with numpy arrays as its initializers."""
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports=OPSETS, name="claim")
    by_name = {value.name: value for node in nodes for value in node.inputs if value is not None}
    for name, array in constants.items():
        by_name[name].const_value = ir.tensor(array, name=name)
        graph.register_initializer(by_name[name])
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def load(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def value(name: str, shape: list | None = None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=shape and ir.Shape(shape), type=ir.TensorType(dtype))


def output_of(nodes: list[ir.Node], name: str) -> ir.Value:
    """Name the first output of the last node, and declare it as float."""
    output = nodes[-1].outputs[0]
    output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    return output


def relative_error(own: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(own - exact) / np.abs(exact)))


def test_sigmoid_is_wrong_for_small_scores(tmp_path):
    """`graph/experts.py` computes 1 / (1 + exp(-x)) instead, since the router compares small scores.

    When this fails, the router can use `Sigmoid`.
    """
    scores, one = value("x", ["n"]), value("one")
    fused = [ir.node("Sigmoid", [scores])]
    x = np.linspace(-30, 0, 1001, dtype=np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    (own,) = load(save(fused, [scores], [output_of(fused, "y")], tmp_path / "fused.onnx")).run(None, {"x": x})
    assert relative_error(own[x < -15], exact[x < -15]) > 0.9, "it gives 0 for a score of 1e-8"

    scores = value("x", ["n"])
    spelt = [ir.node("Neg", [scores])]
    spelt.append(ir.node("Exp", spelt[-1].outputs))
    spelt.append(ir.node("Add", [*spelt[-1].outputs, one]))
    spelt.append(ir.node("Reciprocal", spelt[-1].outputs))
    path = save(spelt, [scores], [output_of(spelt, "y")], tmp_path / "spelt.onnx", one=np.float32(1))
    assert relative_error(load(path).run(None, {"x": x})[0], exact) < 1e-6


def attention(path: Path, **attributes: int) -> onnxruntime.InferenceSession:
    """`GroupQueryAttention` with 2 heads of width 16; with `do_rotary=1` also with rotary tables and positions."""
    rotates = bool(attributes.get("do_rotary"))
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"]
    integers = {"seqlens_k": (ir.DataType.INT32, ["b"]), "total": (ir.DataType.INT32, [1])}
    cache = {"past_key": ["b", HEADS, "p", WIDTH], "past_value": ["b", HEADS, "p", WIDTH]}
    inputs = []
    for name in names:
        dtype, shape = integers.get(name, (ir.DataType.FLOAT, cache.get(name, ["b", "s", HEADS * WIDTH])))
        inputs.append(value(name, shape, dtype))
    arguments, constants = list(inputs), {}
    if rotates:
        angles = np.arange(64)[:, None] / 100 ** np.linspace(0, 1, WIDTH // 2)
        constants = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        inputs.append(value("positions", ["b", "s"], ir.DataType.INT64))
        arguments += [value("cos"), value("sin"), inputs[-1]]
    node = ir.node(
        "GroupQueryAttention",
        arguments,
        {"num_heads": HEADS, "kv_num_heads": HEADS, **attributes},
        domain=MICROSOFT,
        num_outputs=3,
    )
    for output, name in zip(node.outputs, ("y", "present_key", "present_value"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    return load(save([node], inputs, list(node.outputs), path, **constants))


def feeds(rows: int, new: int, past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = {name: random.normal(size=(rows, new, HEADS * WIDTH)) for name in ("query", "key", "value")}
    cache = {name: random.normal(size=(rows, HEADS, past, WIDTH)) for name in ("past_key", "past_value")}
    return {name: array.astype(np.float32) for name, array in (tokens | cache).items()} | {
        "seqlens_k": np.full(rows, past + new - 1, np.int32),
        "total": np.array([past + new], np.int32),
    }


def test_group_query_attention_refuses_several_rows_with_several_new_tokens_on_a_full_cache(tmp_path):
    """`runtime/rows.py` runs such a batch row by row, and `configs.py` avoids it in Optimum's dummy inputs.

    When this fails, both of these can go.
    """
    session = attention(tmp_path / "attention.onnx")
    for rows, new, past in ((3, 4, 0), (3, 1, 5), (1, 4, 5)):
        assert session.run(["y"], feeds(rows, new, past))[0].shape == (rows, new, HEADS * WIDTH)
    with pytest.raises(Exception, match="batch_size must be 1"):
        session.run(["y"], feeds(3, 4, 5))


def test_group_query_attention_does_not_read_all_positions_of_a_prompt(tmp_path):
    """`graph/` rotates queries and keys by `RotaryEmbedding`, before the attention.

    When this fails, `GroupQueryAttention` can rotate them itself, with `do_rotary=1` and `position_ids`.
    """
    session = attention(tmp_path / "attention.onnx", do_rotary=1)
    inputs = feeds(1, 4, 0)
    positions = np.array([[0, 1, 2, 3]]), np.array([[0, 0, 0, 1]]), np.array([[5, 6, 7, 8]])
    plain, padded, later = (session.run(["present_key"], inputs | {"positions": x})[0] for x in positions)
    assert np.abs(plain - later).max() > 0.1
    np.testing.assert_array_equal(plain, padded)


def matmul_error(path: Path, **attributes: int) -> float:
    """The relative error of a 4-bit `MatMulNBits` of one row."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (64, 128))
    scales = random.uniform(0.01, 0.02, 64).astype(np.float32)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).reshape(64, 1, 64)
    x, weight, scale = value("x", ["n", 128]), value("weight"), value("scales")
    options = {"K": 128, "N": 64, "bits": 4, "block_size": 128, **attributes}
    nodes = [ir.node("MatMulNBits", [x, weight, scale], options, domain=MICROSOFT)]
    session = load(save(nodes, [x], [output_of(nodes, "y")], path, weight=packed, scales=scales.reshape(64, 1)))
    row = random.normal(size=(1, 128)).astype(np.float32)
    exact = row.astype(np.float64) @ ((codes - 8) * scales[:, None].astype(np.float64)).T
    return float(np.linalg.norm(session.run(None, {"x": row})[0] - exact) / np.linalg.norm(exact))


def test_matmulnbits_rounds_activations_with_accuracy_level_4_alone(tmp_path):
    """So an export in q4 or q8 differs from its dequantised weights, and validation allows for that.

    When this fails, the tolerance of quantised exports can be that of float ones.
    """
    assert matmul_error(tmp_path / "float.onnx") < 1e-5
    assert 1e-4 < matmul_error(tmp_path / "int8.onnx", accuracy_level=4) < 0.05


def test_weights_that_are_links_are_read_only_from_a_graph_that_is_one(tmp_path):
    """`quality/quantize_cache.py` refuses the Hub's cache, which consists of links.

    When this fails, it can write its graph there.
    """
    real, links = tmp_path / "real", tmp_path / "links"
    real.mkdir()
    links.mkdir()
    x, table = value("x", [2048]), value("table")
    nodes = [ir.node("Add", [x, table])]
    path = save(nodes, [x], [output_of(nodes, "y")], real / "a.onnx", table=np.ones(2048, np.float32))
    ir.save(ir.load(path), real / "model.onnx", external_data="weights")
    for name in ("model.onnx", "weights"):
        (links / name).symlink_to(real / name)
    (links / "copy.onnx").write_bytes((real / "model.onnx").read_bytes())
    for graph in (real / "model.onnx", links / "model.onnx"):
        assert load(graph).run(None, {"x": np.zeros(2048, np.float32)})[0][0] == 1
    with pytest.raises(Exception, match="weights"):
        load(links / "copy.onnx")

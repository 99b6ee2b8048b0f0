"""Measure one layer of LFM2-8B-A1B's experts as QMoE, which decided how experts are quantised.

It is compared with a dense layer as wide as the experts that one token uses.

`python -m benchmarks.experts` prints the milliseconds for 1 token and for 512 tokens. The weights are random, since the
speed does not depend on their values.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import onnx_ir as ir
import onnxruntime


EXPERTS, TOP, HIDDEN, WIDTH = 32, 4, 2048, 1792
TOKENS = (1, 512)
INPUTS = 16  # inputs of one token each, which choose different experts; they are run in turn

# bits, block size, accuracy level
LAYERS = ((4, 128, 4), (4, 64, 4), (4, 32, 4), (4, 128, 0), (8, 128, 4), (8, 32, 4))


def experts(bits: int, block: int, level: int, generator: np.random.Generator) -> ir.Model:
    """Make a model of one `QMoE` with random weights."""
    hidden, routing = _input("hidden", HIDDEN), _input("routing", EXPERTS)
    matrices: list[ir.Value | None] = []
    for name, rows, columns in (("gate_up", 2 * WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
        codes = generator.integers(0, 256, (EXPERTS, rows, columns * bits // 8), dtype=np.uint8)
        matrices += [_weight(name, codes), _weight(f"{name}_scales", _scales(EXPERTS, rows, columns // block)), None]
    attributes = {
        "k": TOP,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "expert_weight_bits": bits,
        "block_size": block,
        "weights_prepacked": 0,
        "accuracy_level": level,
    }
    arguments = [hidden, routing, *matrices, *[None] * 6, routing]
    return _model([ir.node("QMoE", arguments, attributes, domain="com.microsoft")], [hidden, routing])


def dense(bits: int, block: int, generator: np.random.Generator) -> ir.Model:
    """Make a model of a feed-forward as wide as the experts of one token, with random weights."""
    hidden, width = _input("hidden", HIDDEN), TOP * WIDTH

    def linear(x: ir.Value, name: str, rows: int, columns: int) -> ir.Node:
        codes = generator.integers(0, 256, (rows, columns // block, block * bits // 8), dtype=np.uint8)
        scales = _weight(f"{name}_scales", _scales(rows, columns // block))
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 4}
        return ir.node("MatMulNBits", [x, _weight(name, codes), scales], attributes, domain="com.microsoft")

    gate, up = linear(hidden, "gate", width, HIDDEN), linear(hidden, "up", width, HIDDEN)
    silu = ir.node("QuickGelu", gate.outputs, {"alpha": 1.0}, domain="com.microsoft")
    product = ir.node("Mul", [silu.outputs[0], up.outputs[0]])
    return _model([gate, up, silu, product, linear(product.outputs[0], "down", HIDDEN, width)], [hidden])


def _input(name: str, width: int) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("tokens", width)))


def _weight(name: str, values: np.ndarray) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _scales(*shape: int) -> np.ndarray:
    return np.full(shape, 0.002, dtype=np.float32)


def _model(nodes: list[ir.Node], inputs: list[ir.Value]) -> ir.Model:
    output = nodes[-1].outputs[0]
    output.name, output.type = "output", ir.TensorType(ir.DataType.FLOAT)
    weights = [value for node in nodes for value in node.inputs if value is not None and value.const_value is not None]
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=weights, opset_imports={"": 18, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def measure(model: ir.Model, threads: int, rounds: int, generator: np.random.Generator) -> list[float]:
    """Return the median milliseconds for each count of `TOKENS`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    medians = []
    for tokens in TOKENS:
        feeds = [_feeds(session, tokens, generator) for _ in range(INPUTS if tokens == 1 else 1)]
        count = rounds * INPUTS if tokens == 1 else rounds
        times = [_milliseconds(session, feeds[i % len(feeds)]) for i in range(count + 1)]
        medians.append(statistics.median(times[1:]))
    return medians


def _feeds(session: onnxruntime.InferenceSession, tokens: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    routing = np.zeros((tokens, EXPERTS), dtype=np.float32)
    for row in routing:
        row[generator.choice(EXPERTS, TOP, replace=False)] = 1 / TOP
    values = {"hidden": generator.standard_normal((tokens, HIDDEN), dtype=np.float32), "routing": routing}
    return {value.name: values[value.name] for value in session.get_inputs()}


def _milliseconds(session: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(None, feeds)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| operator | bits | block | activations | 1 token, ms | 512 tokens, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for bits, block, level in LAYERS:
        generator = np.random.default_rng(0)
        own = measure(experts(bits, block, level, generator), args.threads, args.rounds, generator)
        print(
            f"| QMoE | {bits} | {block} | {'int8' if level == 4 else 'float'} | {own[0]:.2f} | {own[1]:.0f} |",
            flush=True,
        )
    for bits in (4, 8):
        generator = np.random.default_rng(0)
        bound = measure(dense(bits, 128, generator), args.threads, args.rounds, generator)
        print(f"| dense, MatMulNBits | {bits} | 128 | int8 | {bound[0]:.2f} | {bound[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()

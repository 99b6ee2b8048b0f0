"""Graphs against each other in one process, in turns: `python -m benchmarks.graph_turns ours.onnx theirs.onnx`.

Every graph gets the same session options, and caches bound once: keys and values lie in place, conv states go from one
buffer to another. Each round runs every graph, so a slow moment of the machine meets all. Ratios are taken within a
round, to the first graph.

Of several sessions in one process, a later one is faster: 2 to 7 % where the same file is given four times with
`--loads 1`. So all graphs are loaded several times, each time with another graph first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnxruntime


DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


PAUSE = 0.05  # seconds: the threads of the session before spin for a while after their last call


class Graph:
    """A session with caches that have room for `length` tokens."""

    def __init__(self, path: Path, threads: int, length: int, head_dim: int = 64) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.arrays: list[np.ndarray] = []  # they must outlive the bindings
        self._head_dim = head_dim
        self.caches = {x.name: self._empty(x, length) for x in self.session.get_inputs() if x.name.startswith("past")}

    def _empty(self, value: onnxruntime.NodeArg, length: int) -> np.ndarray:
        open_axes = {2: length, 3: self._head_dim}  # genai's builder declares neither
        shape = (1, *(open_axes[i] if isinstance(axis, str) else axis for i, axis in enumerate(value.shape) if i))
        self.arrays.append(np.zeros(shape, DTYPES[value.type]))
        return self.arrays[-1]

    def call(self, tokens: int, past: int) -> onnxruntime.IOBinding:
        """A call of so many tokens after `past` others."""
        columns = np.arange(past + tokens, dtype=np.int64)
        values = {
            "input_ids": np.ones((1, tokens), np.int64),
            "attention_mask": np.ones((1, past + tokens), np.int64),
            "position_ids": columns[None, past:],
            "num_logits_to_keep": np.array(1, np.int64),
            **self.caches,
        }
        binding = self.session.io_binding()
        for value in (*self.session.get_inputs(), *self.session.get_overridable_initializers()):
            self._bind(binding.bind_input, value.name, values[value.name])
        presents = [value for value in self.session.get_outputs() if value.name.startswith("present")]
        grows = {value.name: len(value.shape) == 4 and not isinstance(value.shape[2], int) for value in presents}
        for value, before in zip(presents, self.caches.values(), strict=True):
            self._bind(binding.bind_output, value.name, before if grows[value.name] else np.zeros_like(before))
        logits = self.session.get_outputs()[0]
        self._bind(binding.bind_output, logits.name, np.zeros((1, 1, logits.shape[2]), DTYPES[logits.type]))
        return binding

    def _bind(self, bind, name: str, array: np.ndarray) -> None:
        self.arrays.append(array)
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def milliseconds(self, binding: onnxruntime.IOBinding, calls: int = 1) -> float:
        """The median time of a call, which is made so many times after one that does not count."""
        time.sleep(PAUSE)
        self.session.run_with_iobinding(binding)
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            self.session.run_with_iobinding(binding)
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)


def rotated(count: int, start: int) -> list[int]:
    """The numbers below `count`, from one of them on."""
    return [(start + i) % count for i in range(count)]


def take_turns(graphs: dict[int, Graph], tokens: int, past: int, rounds: int, calls: int) -> list[list[float]]:
    """Milliseconds of a call, of each graph in each round."""
    if not rounds:
        return []
    bound = {i: graph.call(tokens, past) for i, graph in graphs.items()}
    for i, graph in graphs.items():
        graph.milliseconds(bound[i], calls)
    turns = []
    for number in range(rounds):  # who goes first changes
        times = {i: graphs[i].milliseconds(bound[i], calls) for i in rotated(len(graphs), number)}
        turns.append([times[i] for i in range(len(graphs))])
    return turns


def report(kind: str, paths: list[Path], turns: list[list[float]]) -> None:
    print(f"{kind}, {len(turns)} rounds: ms (median, lowest), ratio (quartiles)")
    for path, own in zip(paths, zip(*turns, strict=True), strict=True):
        ratios = [time / turn[0] for time, turn in zip(own, turns, strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        print(
            f"  {path.parent.name}/{path.name:12} {statistics.median(own):8.2f} {min(own):8.2f}"
            f"   {middle:.3f} ({low:.3f} to {high:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "graphs", type=Path, nargs="+", help=".onnx files; the first is what the others are measured by"
    )
    parser.add_argument("--loads", type=int, help="(default: one for each graph)")
    parser.add_argument("--rounds", type=int, default=20, help="of each loading")
    parser.add_argument("--steps", type=int, default=12, help="calls of one token a turn")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--prefill-rounds", type=int, default=2, help="of each loading")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64, help="where a graph does not declare it")
    args = parser.parse_args()
    decode, prefill = [], []
    for load in range(args.loads or len(args.graphs)):
        order = rotated(len(args.graphs), load)
        graphs = {i: Graph(args.graphs[i], args.threads, args.prompt + 1, args.head_dim) for i in order}
        decode += take_turns(graphs, 1, args.prompt, args.rounds, args.steps)
        prefill += take_turns(graphs, args.prompt, 0, args.prefill_rounds, 1)
    for kind, turns in (("decode", decode), ("prefill", prefill)):
        if turns:
            report(kind, args.graphs, turns)


if __name__ == "__main__":
    main()

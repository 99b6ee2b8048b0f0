"""Measure the choices for quantised weights: `python -m benchmarks.quantization WHAT`.

- `quality` quantises the trained checkpoint's weights in several ways and compares each result with the checkpoint. The
  activations stay in float.
- `parts` does so too: of the q4 weights, one kind of layer at a time has 8 bits.
- `speed` exports the shape of LFM2-350M with several block sizes and runs the graphs in turn.
- `mixes` does so with parts in 8 bits.
- `activations` does so with q8 and each `accuracy_level` of its products, beside fp32. Where the package xllamacpp is
  installed, llama.cpp's Q8_0 has its turn too.
- `cache` quantises the KV cache with more and less headroom, and compares each file with the export it was made of.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.bench import say
from benchmarks.checkpoint import random_checkpoint
from benchmarks.gguf_files import ggml_quantiser, q8_0, write_gguf
from benchmarks.systems import loop
from benchmarks.systems.llama import LlamaCpp
from optimum_lfm2.quality import quantize_cache
from optimum_lfm2.quality.evaluate import evaluate
from optimum_lfm2.weights.blocks import SCHEMES, Blocks, Scheme, dequantize_tensor, quantize_tensor


DEMO = Path(__file__).parent.parent / "demo"
SIZES = (32, 64, 128)
HEADROOMS = (0.8, 1.0, 1.25, 1.5)

# Takes blocks (rows, block_size), bits and block size. Returns the blocks after quantisation and dequantisation.
Method = Callable[[torch.Tensor, int, int], torch.Tensor]


def ours(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Quantise as this package does."""
    blocks = Blocks(bits, size)
    return dequantize_tensor(*quantize_tensor(values, blocks), size, blocks)


def nearest(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Round to the nearest code, without zero points."""
    half = 1 << (bits - 1)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scales = torch.where(-low > high, low, high) / -half
    return (values / torch.where(scales == 0, 1, scales)).round().clamp(-half, half - 1) * scales


def nearest_with_zero_points(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Round to the nearest code, with integer zero points."""
    top = (1 << bits) - 1
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    scales = torch.where(high == low, 1, (high - low) / top)
    zero = (-low / scales).round()
    return ((values / scales + zero).round().clamp(0, top) - zero) * scales


def k_quant(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Quantise with onnxruntime's k-quant."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    codes, scales, zero = quant_tensor_k_quant_cpu(values.numpy(), bits, size)
    return torch.from_numpy((codes - zero) * scales).float()


def hqq(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Quantise with onnxruntime's HQQ, whose zero points are float."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, HQQWeightOnlyQuantizer

    quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size=size, bits=bits))
    codes, scales, zero = quantizer.quantize_internal(values, bits, True, size)
    return (codes - zero) * scales


METHODS: dict[str, Method] = {
    "round to nearest": nearest,
    "the same with zero points": nearest_with_zero_points,
    "k-quant (zero points)": k_quant,
    "HQQ (float zero points)": hqq,
    "ours": ours,
}


def quality() -> None:
    """Print the table of `quality`."""
    print("| codes | bits | block | table | perplexity | mean KL divergence | same top token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label, method, scheme in _candidates():
        with tempfile.TemporaryDirectory() as folder:
            _round_checkpoint(Path(folder), method, scheme)
            found = evaluate(folder, DEMO / "checkpoint", DEMO / "heldout.txt")
        divergence = f"{found.kl_divergence:.6f} ± {found.kl_divergence_error:.6f}"
        cells = f"{_cells(scheme)} | {found.perplexity:.4f} | {divergence} | {found.top1_agreement:.2%}"
        print(f"| {label} | {cells} |", flush=True)


def _candidates() -> Iterator[tuple[str, Method, Scheme]]:
    for size in SIZES:
        for label, method in METHODS.items():
            yield label, method, Scheme(Blocks(4, size), Blocks(4, size))
    for scheme in _schemes():
        if scheme.linear.bits == 8 or scheme.table != scheme.linear:
            yield "ours", ours, scheme


def _schemes() -> Iterator[Scheme]:
    """Return the schemes that are compared: those of `--variant` among them, and one with small blocks in the table."""
    for bits, table in ((4, 4), (4, 8), (8, 8)):
        for size in SIZES:
            yield Scheme(Blocks(bits, size), Blocks(table, size))
        if (bits, table) == (4, 4):
            yield Scheme(Blocks(4, 128), Blocks(4, 32))


def _cells(scheme: Scheme) -> str:
    """Format bits, block size and table as cells of a row."""
    linear, table = scheme.linear, scheme.table
    own = "" if table.block_size == linear.block_size else f", blocks of {table.block_size}"
    return f"{linear.bits} | {linear.block_size} | {table.bits} bits{own}"


@torch.no_grad()
def _round_checkpoint(folder: Path, method: Method, scheme: Scheme) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32)
    linears = (module for module in model.base_model.layers.modules() if isinstance(module, torch.nn.Linear))
    _round(model, scheme.table, method, dict.fromkeys(linears, scheme.linear))
    model.save_pretrained(folder)


def _round(model: Any, table: Blocks, method: Method, linears: Mapping[torch.nn.Module, Blocks]) -> None:
    embedding = model.get_input_embeddings().weight  # the head is tied to it
    embedding.copy_(_by_blocks(embedding, table, method))
    for module, blocks in linears.items():
        module.weight.copy_(_by_blocks(module.weight, blocks, method))


# The linear layers of the decoder by what they are for: patterns of their names behind `model.layers.`.
PARTS = {
    "none": r"(?!)",
    "convolutions": r"\d+\.conv\.(in|out)_proj",
    "in_proj of convolutions": r"\d+\.conv\.in_proj",
    "out_proj of convolutions": r"\d+\.conv\.out_proj",
    "queries, keys and values": r"\d+\.self_attn\.[qkv]_proj",
    "values": r"\d+\.self_attn\.v_proj",
    "gates of heads": r"\d+\.self_attn\.g_proj",
    "outputs of attention": r"\d+\.self_attn\.(o|out)_proj",
    "w1 and w3": r"\d+\.feed_forward\.w[13]",
    "w2": r"\d+\.feed_forward\.w2",
    "the first layer": r"0\..*",
    "the last layer": r"{last}\..*",
    "w2 and the last layer": r"\d+\.feed_forward\.w2|{last}\..*",
}


@torch.no_grad()
def parts(checkpoint: Path, text: Path) -> None:
    """Print the table of `parts`."""
    wide = replace(SCHEMES["q4"].linear, bits=8)
    print("| in 8 bits | size of the decoder | mean KL divergence | same top token |\n| --- | --- | --- | --- |")
    variants = [(label, part, SCHEMES["q4"]) for label, part in PARTS.items()]
    variants += [(f"{label}, and the table in 4 bits", PARTS[label], SCHEMES["q4s"]) for label in ("none", "w2")]
    for label, part, scheme in variants:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        layers = model.base_model.layers
        linears = {n: m for n, m in layers.named_modules() if isinstance(m, torch.nn.Linear)}
        chosen = {name for name in linears if re.fullmatch(part.replace("{last}", str(len(layers) - 1)), name)}
        if not chosen and part != PARTS["none"]:
            continue  # a kind that this member lacks
        blocks = {name: wide if name in chosen else scheme.linear for name in linears}
        _round(model, scheme.table, ours, {module: blocks[name] for name, module in linears.items()})
        size = sum(module.weight.numel() * blocks[name].bits for name, module in linears.items())
        least = sum(module.weight.numel() * 4 for module in linears.values())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found = evaluate(folder, checkpoint, text)
        divergence = f"{found.kl_divergence:.6f} ± {found.kl_divergence_error:.6f}"
        print(f"| {label} | {size / least:.0%} | {divergence} | {found.top1_agreement:.2%} |", flush=True)


def _by_blocks(weight: torch.Tensor, blocks: Blocks, method: Method) -> torch.Tensor:
    size = blocks.block_size
    values = F.pad(weight.float(), (0, -weight.shape[1] % size)).reshape(-1, size)
    return method(values, blocks.bits, size).reshape(len(weight), -1)[:, : weight.shape[1]]


PREFILL, DECODE = "prefill", "typical_step"  # what a run has of each


def speed(work: Path, rounds: int, threads: int) -> None:
    """Print the table of `speed`."""
    print("| bits | block | table | prefill tok/s | decode tok/s | MB |\n| --- | --- | --- | --- | --- | --- |")
    for cells, _, prefill, decode, size in _speeds({_cells(s): s for s in _schemes()}, work, rounds, threads):
        print(f"| {cells} | {prefill:.0f} | {decode:.0f} | {size:.0f} |")


def _mix(scheme: Scheme, *names: str, layers: Iterable[int] = range(16)) -> Scheme:
    """Return a scheme of which linear layers of 350M have 8 bits, by their names in these layers."""
    wide = replace(scheme.linear, bits=8)
    return replace(scheme, stored={f"model.layers.{i}.{name}": wide for i in layers for name in names})


FEED_FORWARD, CONVOLUTION = tuple(f"feed_forward.w{i}" for i in (1, 2, 3)), ("conv.in_proj", "conv.out_proj")
MIXES = {
    "q4s": SCHEMES["q4s"],
    "q4s, w2 in 8 bits": _mix(SCHEMES["q4s"], "feed_forward.w2"),
    "q4": SCHEMES["q4"],
    "q4, the last layer in 8 bits": _mix(SCHEMES["q4"], *FEED_FORWARD, *CONVOLUTION, layers=[15]),
    "q4, convolutions in 8 bits": _mix(SCHEMES["q4"], *CONVOLUTION),
    "q4, w2 in 8 bits": _mix(SCHEMES["q4"], "feed_forward.w2"),
}


def mixes(work: Path, rounds: int, threads: int) -> None:
    """Print the table of `mixes`."""
    print("| weights | prefill tok/s | to q4 | decode tok/s | to q4 | MB |\n" + "| --- " * 6 + "|")
    rows = _speeds(MIXES, work, rounds, threads)
    base = next(runs for label, runs, *_ in rows if label == "q4")
    for label, runs, prefill, decode, size in rows:
        by = " | ".join((f"{prefill:.0f}", _ratio(base, runs, PREFILL), f"{decode:.1f}", _ratio(base, runs, DECODE)))
        print(f"| {label} | {by} | {size:.0f} |")


def _ratio(base: Sequence[Any], runs: Sequence[Any], which: str) -> str:
    """The ratio of speeds to those of `base`: the median of the rounds' ratios, and the lowest and highest."""
    found = [getattr(a, which) / getattr(b, which) for a, b in zip(base, runs, strict=True)]
    return f"{statistics.median(found):.2f} [{min(found):.2f} to {max(found):.2f}]"


def activations(work: Path, rounds: int, threads: int) -> None:
    """Print the table of `activations`."""
    checkpoint, folder = random_checkpoint(work), work / "quantized-q8"
    _export(checkpoint, folder, SCHEMES["q8"])
    systems = {"q8, accuracy_level 4": loop.System(folder, threads, 1024, "q8")}
    for level in (1, 0):
        other = work / f"quantized-q8-{level}"
        _at_level(folder, other, level)
        systems[f"q8, accuracy_level {level}"] = loop.System(other, threads, 1024, "q8")
    _export(checkpoint, work / "quantized-fp32", None)
    systems["fp32"] = loop.System(work / "quantized-fp32", threads, 1024, "fp32")
    if find_spec("xllamacpp"):
        path = work / "gguf" / "speed.Q8_0.gguf"
        path.parent.mkdir(exist_ok=True)
        write_gguf(checkpoint, path, q8_0, ggml_quantiser())
        systems["llama.cpp, Q8_0"] = LlamaCpp(path, threads, 1024)
    timings = _turns(systems, rounds)
    base = timings["q8, accuracy_level 4"]
    print("| system | prefill tok/s | to level 4 | decode tok/s | to level 4 |\n" + "| --- " * 5 + "|")
    for label, runs in timings.items():
        speeds = (f"{512 / _median(runs, PREFILL):.0f}", f"{1 / _median(runs, DECODE):.1f}")
        print(f"| {label} | {speeds[0]} | {_ratio(base, runs, PREFILL)} | {speeds[1]} | {_ratio(base, runs, DECODE)} |")


def _at_level(folder: Path, other: Path, level: int) -> None:
    """Write a folder with the same weights whose products have another `accuracy_level`."""
    import onnx_ir as ir

    shutil.rmtree(other, ignore_errors=True)
    other.mkdir()
    (other / "model.onnx_data").hardlink_to(folder / "model.onnx_data")
    model = ir.load(folder / "model.onnx")
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    ir.save(model, other / "model.onnx")


def _speeds(
    schemes: Mapping[str, Scheme], work: Path, rounds: int, threads: int
) -> list[tuple[str, list[Any], float, float, float]]:
    """Export 350M by each scheme and run the graphs in turn.

    Returns:
        Of each its label, its runs, tokens a second of prefill and decode, and the MB of its weights.
    """
    checkpoint = random_checkpoint(work)
    systems, sizes = {}, {}
    for label, scheme in schemes.items():
        folder = work / f"quantized-{''.join(filter(str.isalnum, label))}"
        _export(checkpoint, folder, scheme)
        systems[label] = loop.System(folder, threads, 1024, "q4")
        sizes[label] = (folder / "model.onnx_data").stat().st_size / 1e6
    return [
        (label, runs, 512 / _median(runs, PREFILL), 1 / _median(runs, DECODE), sizes[label])
        for label, runs in _turns(systems, rounds).items()
    ]


def _turns(systems: Mapping[str, Any], rounds: int) -> dict[str, list[Any]]:
    prompt = [8 + i * 79 % 240 for i in range(512)]
    timings: dict[str, list[Any]] = {label: [] for label in systems}
    for _ in range(rounds):
        for label, system in systems.items():
            run = system.run(prompt, 32)
            timings[label].append(run)
            say(f"{label}: {512 / run.prefill:.0f} and {1 / run.typical_step:.1f} tok/s")
    return timings


def _median(runs: Sequence[Any], which: str) -> float:
    return statistics.median(getattr(run, which) for run in runs)


def cache(chunks: int = 64) -> None:
    """Print the table of `cache`."""
    from optimum.exporters.onnx import main_export

    print("| weights | headroom | mean KL divergence | same top token |\n| --- | --- | --- | --- |")
    for variant in ("default", "q8", "q4"):
        with tempfile.TemporaryDirectory() as folder:
            main_export(str(DEMO / "checkpoint"), folder, _variant=variant, do_validation=False)
            for headroom in HEADROOMS:
                with patch.object(quantize_cache, "HEADROOM", headroom):
                    _, _, found = quantize_cache.quantize_cache(folder, DEMO / "heldout.txt", chunks)
                divergence = f"{found.kl_divergence:.6f} ± {found.kl_divergence_error:.6f}"
                print(f"| {variant} | {headroom} | {divergence} | {found.top1_agreement:.2%} |", flush=True)


def _export(checkpoint: Path, folder: Path, scheme: Scheme | None) -> None:
    from optimum.exporters.onnx import main_export

    from optimum_lfm2 import configs

    shutil.rmtree(folder, ignore_errors=True)
    if scheme is None:
        main_export(str(checkpoint), folder, do_validation=False)
        return
    # The package takes `stored` from a GGUF file alone.
    with patch.dict(SCHEMES, q4=scheme), patch.object(configs, "keeping", lambda asked, _: _as_stored(asked, scheme)):
        main_export(str(checkpoint), folder, _variant="q4", do_validation=False)


def _as_stored(asked: Scheme, scheme: Scheme) -> Scheme:
    return replace(asked, stored=scheme.stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "parts", "speed", "mixes", "activations", "cache"))
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint", help="of `parts`: a trained one")
    parser.add_argument("--text", type=Path, default=DEMO / "heldout.txt", help="of `parts`, in UTF-8")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"), help="folder for the models of 350M (3 GB)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of what measures speed")
    parser.add_argument("--threads", type=int, default=2, help="threads of it")
    args = parser.parse_args()
    if args.what == "quality":
        quality()
    elif args.what == "parts":
        parts(args.checkpoint, args.text)
    elif args.what == "cache":
        cache()
    else:
        measure = {"speed": speed, "mixes": mixes, "activations": activations}[args.what]
        measure(args.work, args.rounds, args.threads)


if __name__ == "__main__":
    main()

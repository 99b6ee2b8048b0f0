"""Measure the choices for quantised weights: `python -m benchmarks.quantization quality|parts|speed|cache`.

`quality` quantises the trained checkpoint's weights in several ways and compares each result with the checkpoint. The
activations stay in float. `parts` does so too: of the q4 weights, one kind of layer at a time has 8 bits. `speed`
exports the shape of LFM2-350M with several block sizes and runs the graphs in turn. `cache` quantises the KV cache with
more and less headroom, and compares each file with the export it was made of.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import random_checkpoint
from benchmarks.systems import loop
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


# The linear layers of the decoder by what they are for, as their names begin and end in `model.layers.N`.
PARTS = {
    "none": (),
    "convolutions": ("conv.in_proj", "conv.out_proj"),
    "queries, keys and values": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "values": ("self_attn.v_proj",),
    "gates of heads": ("self_attn.g_proj",),
    "outputs of attention": ("self_attn.o_proj", "self_attn.out_proj"),
    "w1 and w3": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}


@torch.no_grad()
def parts(checkpoint: Path, text: Path) -> None:
    """Print the table of `parts`."""
    wide = replace(SCHEMES["q4"].linear, bits=8)
    print("| in 8 bits | size of the decoder | mean KL divergence | same top token |\n| --- | --- | --- | --- |")
    variants = [(label, part, SCHEMES["q4"]) for label, part in PARTS.items()]
    variants.append(("none, and the table in 4 bits", (), SCHEMES["q4s"]))
    for label, part, scheme in variants:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        linears = {n: m for n, m in model.base_model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
        if part and not any(name.endswith(part) for name in linears):
            continue  # a kind that this member lacks
        blocks = {name: wide if part and name.endswith(part) else scheme.linear for name in linears}
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


def speed(work: Path, rounds: int, threads: int) -> None:
    """Print the table of `speed`."""
    checkpoint = random_checkpoint(work)
    systems, sizes, timings = {}, {}, {}
    for scheme in _schemes():
        cells = _cells(scheme)
        folder = work / f"quantized-{''.join(filter(str.isalnum, cells))}"
        _export(checkpoint, folder, scheme)
        systems[cells] = loop.System(folder, threads, 1024, "q4")
        sizes[cells] = (folder / "model.onnx_data").stat().st_size / 1e6
        timings[cells] = []
    prompt = [8 + i * 79 % 240 for i in range(512)]
    for _ in range(rounds):
        for cells, system in systems.items():
            timings[cells].append(system.run(prompt, 32))
    print("| bits | block | table | prefill tok/s | decode tok/s | MB |\n| --- | --- | --- | --- | --- | --- |")
    for cells, runs in timings.items():
        prefill = 512 / statistics.median(run.prefill for run in runs)
        decode = 1 / statistics.median(run.typical_step for run in runs)
        print(f"| {cells} | {prefill:.0f} | {decode:.0f} | {sizes[cells]:.0f} |")


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


def _export(checkpoint: Path, folder: Path, scheme: Scheme) -> None:
    from optimum.exporters.onnx import main_export

    shutil.rmtree(folder, ignore_errors=True)
    with patch.dict(SCHEMES, q4=scheme):
        main_export(str(checkpoint), folder, _variant="q4", do_validation=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "parts", "speed", "cache"))
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "checkpoint", help="of `parts`: a trained one")
    parser.add_argument("--text", type=Path, default=DEMO / "heldout.txt", help="of `parts`, in UTF-8")
    parser.add_argument(
        "--work", type=Path, default=Path(".benchmarks"), help="folder for the models of `speed` (3 GB)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of `speed`")
    parser.add_argument("--threads", type=int, default=2, help="threads of `speed`")
    args = parser.parse_args()
    if args.what == "quality":
        quality()
    elif args.what == "parts":
        parts(args.checkpoint, args.text)
    elif args.what == "cache":
        cache()
    else:
        speed(args.work, args.rounds, args.threads)


if __name__ == "__main__":
    main()

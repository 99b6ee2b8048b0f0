"""What decided the defaults of --variant: `python -m benchmarks.quantization quality`, and `speed`.

`quality` rounds the trained checkpoint's weights in several ways and compares each with the checkpoint; activations
stay in float. `speed` exports the shape of LFM2-350M with several block sizes and runs the graphs in turn.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from transformers import Lfm2ForCausalLM

from benchmarks.checkpoint import make_350m
from benchmarks.systems import loop
from optimum_lfm2.evaluate import evaluate
from optimum_lfm2.export.quantize import VARIANTS, Blocks, Scheme, dequantize_tensor, quantize_tensor


DEMO = Path(__file__).parent.parent / "demo"
SIZES = (32, 64, 128)

Method = Callable[
    [torch.Tensor, int, int], torch.Tensor
]  # blocks (rows, block_size), bits, block size → what is stored


def ours(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    blocks = Blocks(bits, size)
    return dequantize_tensor(*quantize_tensor(values, blocks), size, blocks)


def nearest(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scales = torch.where(-low > high, low, high) / -half
    return (values / torch.where(scales == 0, 1, scales)).round().clamp(-half, half - 1) * scales


def nearest_with_zero_points(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    top = (1 << bits) - 1
    low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
    scales = torch.where(high == low, 1, (high - low) / top)
    zero = (-low / scales).round()
    return ((values / scales + zero).round().clamp(0, top) - zero) * scales


def k_quant(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    codes, scales, zero = quant_tensor_k_quant_cpu(values.numpy(), bits, size)
    return torch.from_numpy((codes - zero) * scales).float()


def hqq(values: torch.Tensor, bits: int, size: int) -> torch.Tensor:
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
    print("| codes | bits | block | table | perplexity | mean KL divergence | same top token |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label, bits, size, method, table in _candidates():
        with tempfile.TemporaryDirectory() as folder:
            _round_checkpoint(Path(folder), lambda w, b, m=method, s=size: _by_blocks(w, b, s, m), bits, table)
            found = evaluate(folder, DEMO / "checkpoint", DEMO / "heldout.txt")
        divergence = f"{found.kl_divergence:.6f} ± {found.kl_divergence_error:.6f}"
        print(
            f"| {label} | {bits} | {size} | {table} bits | {found.perplexity:.4f} | {divergence} "
            f"| {found.top1_agreement:.2%} |",
            flush=True,
        )


def _candidates() -> Iterator[tuple[str, int, int, Method, int]]:
    for size in SIZES:
        for label, method in METHODS.items():
            yield label, 4, size, method, 4
    for bits in (4, 8):
        for size in SIZES:
            yield "ours", bits, size, ours, 8


def _by_blocks(weight: torch.Tensor, bits: int, size: int, method: Method) -> torch.Tensor:
    blocks = F.pad(weight.float(), (0, -weight.shape[1] % size)).reshape(-1, size)
    return method(blocks, bits, size).reshape(len(weight), -1)[:, : weight.shape[1]]


@torch.no_grad()
def _round_checkpoint(
    folder: Path, rounded: Callable[[torch.Tensor, int], torch.Tensor], bits: int, table: int
) -> None:
    model = Lfm2ForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32)
    embedding = model.get_input_embeddings().weight  # the head is tied to it
    embedding.copy_(rounded(embedding, table))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            module.weight.copy_(rounded(module.weight, bits))
    model.save_pretrained(folder)


def speed(work: Path, rounds: int, threads: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "lfm2-350m"
    if not (checkpoint / "config.json").is_file():
        make_350m(checkpoint)
    schemes = {(bits, size, table): Scheme(Blocks(bits, size), Blocks(table, size)) for bits, size, table in _layouts()}
    systems, sizes = {}, {}
    for layout, scheme in schemes.items():
        folder = work / "-".join(map(str, ("quantized", *layout)))
        _export(checkpoint, folder, scheme)
        systems[layout] = loop.System(folder, threads, 1024, "q4")
        sizes[layout] = (folder / "model.onnx_data").stat().st_size / 1e6
    prompt = [8 + i * 79 % 240 for i in range(512)]
    timings = {layout: [] for layout in systems}
    for _ in range(rounds):
        for layout, system in systems.items():
            timings[layout].append(system.run(prompt, 32))
    print("| bits | block | table | prefill tok/s | decode tok/s | MB |\n| --- | --- | --- | --- | --- | --- |")
    for (bits, size, table), runs in timings.items():
        prefill = 512 / statistics.median(run.prefill for run in runs)
        decode = 1 / statistics.median(run.typical_step for run in runs)
        megabytes = sizes[bits, size, table]
        print(f"| {bits} | {size} | {table} bits | {prefill:.0f} | {decode:.0f} | {megabytes:.0f} |")


def _layouts() -> Iterator[tuple[int, int, int]]:
    for bits, table in ((4, 4), (4, 8), (8, 8)):
        for size in SIZES:
            yield bits, size, table


def _export(checkpoint: Path, folder: Path, scheme: Scheme) -> None:
    from optimum.exporters.onnx import main_export

    shutil.rmtree(folder, ignore_errors=True)
    with patch.dict(VARIANTS, q4=scheme):
        main_export(str(checkpoint), folder, _variant="q4", do_validation=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument(
        "--work", type=Path, default=Path(".benchmarks"), help="folder for the models of `speed` (3 GB)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="of `speed`")
    parser.add_argument("--threads", type=int, default=2, help="of `speed`")
    args = parser.parse_args()
    if args.what == "quality":
        quality()
    else:
        speed(args.work, args.rounds, args.threads)


if __name__ == "__main__":
    main()

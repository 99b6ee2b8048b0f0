"""Check and measure fp16 and q4f16 on a GPU: `python -m benchmarks.cuda`.

The logits are compared with those of the CPU, the decode speed with the bound that the memory's bandwidth sets.

It needs onnxruntime-gpu and a CUDA build of torch. The exit code is 1 without a GPU, and where the logits disagree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnxruntime
import torch

import optimum_lfm2  # noqa: F401  registers LFM2, before anything of optimum
from benchmarks.bench import Bench, say
from benchmarks.checkpoint import random_checkpoint
from benchmarks.systems.base import run_generate
from benchmarks.worker import prompt_ids


GRAPHS = {"fp16": {"dtype": "fp16"}, "q4f16": {"dtype": "fp16", "_variant": "q4"}}
# Relative to the largest logit. A GPU computes in half precision, and in q4f16 a CPU rounds activations to 8 bits.
TOLERANCE = 0.05
COPY_BYTES = 2**30


def bandwidth() -> float:
    """Measure this GPU's memory bandwidth by a copy, in bytes per second. Reads and writes are counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * COPY_BYTES / (start.elapsed_time(end) / 1000))
    return best


def export(bench: Bench, name: str) -> Path:
    """Export the checkpoint in one precision and return the folder."""
    from optimum.exporters.onnx import main_export

    folder = bench.work / f"cuda-{name}"
    say(f"exporting {name}")
    main_export(str(bench.checkpoint), folder, do_validation=False, **GRAPHS[name])
    return folder


def load(folder: Path, provider: str):
    """Load an export on an execution provider of onnxruntime."""
    from optimum.onnxruntime import ORTModelForCausalLM

    return ORTModelForCausalLM.from_pretrained(folder, provider=provider)


def compare(folder: Path, ids: list[int]) -> float:
    """Return the largest difference of the GPU's logits from the CPU's, relative to the largest logit.

    A prompt and one decoding step are compared.
    """
    inputs = torch.tensor([ids])
    logits = []
    for provider, device in (("CPUExecutionProvider", "cpu"), ("CUDAExecutionProvider", "cuda")):
        model = load(folder, provider)
        first = model(input_ids=inputs[:, :-1].to(device))
        last = model(
            input_ids=inputs[:, -1:].to(device),
            attention_mask=torch.ones_like(inputs).to(device),
            past_key_values=first.past_key_values,
        )
        logits.append(torch.cat([first.logits, last.logits], dim=1).float().cpu())
    cpu, gpu = logits
    return float((cpu - gpu).abs().max() / cpu.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"), help="folder for the models")
    parser.add_argument("--checkpoint", type=Path, help="an LFM2 checkpoint instead of the random one")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        sys.exit("No CUDA here: this needs a GPU, a CUDA build of torch and onnxruntime-gpu.")
    bench = Bench(args.work, args.checkpoint or random_checkpoint(args.work), threads=2, pythons={})
    ids = prompt_ids(args.prompt, bench.vocabulary)
    peak = bandwidth()
    print(f"{torch.cuda.get_device_name()}, {peak / 1e9:.0f} GB/s\n")
    print("| graph | GPU from CPU | prefill tok/s | decode tok/s | bound by bandwidth | of it |")
    print("| --- | --- | --- | --- | --- | --- |")
    worst = 0.0
    for name in GRAPHS:
        folder = export(bench, name)
        difference = compare(folder, ids)
        worst = max(worst, difference)
        model = load(folder, "CUDAExecutionProvider")
        run_generate(model, ids, args.new)
        runs = [run_generate(model, ids, args.new) for _ in range(args.repeats)]
        prefill = sorted(len(ids) / run.prefill for run in runs)[len(runs) // 2]
        decode = sorted(args.new / run.decode for run in runs)[len(runs) // 2]
        bound = peak / sum(path.stat().st_size for path in folder.glob("*.onnx*"))  # a token reads every weight once
        cells = f"{difference:.1e} | {prefill:.0f} | {decode:.1f} | {bound:.0f} | {decode / bound:.0%}"
        print(f"| {name} | {cells} |", flush=True)
    if worst > TOLERANCE:
        sys.exit(f"The GPU's logits differ from the CPU's by {worst:.2g} of the largest; {TOLERANCE} is allowed.")


if __name__ == "__main__":
    main()

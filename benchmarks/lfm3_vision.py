"""Measure the vision encoder of LFM3-VL's default shape on a square picture, in turns with transformers.

`python -m benchmarks.lfm3_vision --work FOLDER` makes a checkpoint with random weights, exports its encoder in float32,
and prints a table for each size of the picture. The decoder that the checkpoint needs has one layer: no figure here
depends on it. Ratios to transformers are taken within a round. It needs transformers 5.23.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checkpoint import add_tokenizer, save_seeded
from benchmarks.turns import shuffled
from optimum_lfm2.compat import picture_features


TEXT = {"model_type": "lfm3", "vocab_size": 2048, "num_hidden_layers": 1, "layer_types": ["conv"]}
TEXT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 7}
PROCESSOR = '{"image_processor_type": "Qwen2VLImageProcessor", "patch_size": %d}'


def make(path: Path, **changes: Any) -> Path:
    """Save a checkpoint with seeded random weights. `changes` are options of the tower's configuration."""
    from transformers import Lfm3VlConfig, Lfm3VlForConditionalGeneration

    config = Lfm3VlConfig(text_config=TEXT, vision_config=changes)
    save_seeded(path, Lfm3VlForConditionalGeneration, config)
    (path / "preprocessor_config.json").write_text(PROCESSOR % config.vision_config.patch_size)
    return add_tokenizer(path)


def export(checkpoint: Path, path: Path) -> Path:
    """Write the vision encoder of a checkpoint."""
    from optimum.exporters.onnx import convert

    from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager
    from optimum_lfm2.vision_configs import VisionOnnxConfig

    model = Lfm2TasksManager.get_model_from_task("image-text-to-text", str(checkpoint), torch_dtype=torch.float32)
    config = VisionOnnxConfig(model.config, float_dtype="fp32")
    config.variant = "default"
    convert.export(model, config, path)
    return path


def picture(config: Any, side: int) -> dict[str, torch.Tensor]:
    """A square picture of `side` pixels, as the processor gives it."""
    vision = config.vision_config
    patches = side // vision.patch_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.rand(patches**2, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, patches, patches]])}


Encode = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def load(work: Path, threads: int) -> tuple[Any, dict[str, Encode]]:
    """Return the model's configuration and, by the system's name, what encodes a picture.

    The features are float32 (picture tokens, hidden_size).
    """
    import onnxruntime
    from transformers import AutoModelForImageTextToText

    torch.set_num_threads(threads)
    gold: Any = AutoModelForImageTextToText.from_pretrained(work / "checkpoint", dtype=torch.float32).eval()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(work / "vision_encoder.onnx", options)

    @torch.inference_mode()
    def transformers(shown: dict[str, torch.Tensor]) -> torch.Tensor:
        return picture_features(gold, shown)

    def ours(shown: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: values.numpy() for name, values in shown.items()})[0])

    return gold.config, {"transformers": transformers, "ours-fp32": ours}


def take_turns(systems: dict[str, Encode], shown: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each system in each round. One round more comes first."""
    orders, seconds = random.Random(0), {name: [] for name in systems}
    for _ in range(rounds + 1):
        for name in shuffled(systems, orders):
            start = time.perf_counter()
            systems[name](shown)
            seconds[name].append(time.perf_counter() - start)
    return {name: own[1:] for name, own in seconds.items()}


def table(seconds: dict[str, Sequence[float]]) -> str:
    """Medians, and the quartiles of the ratios: how many times as fast as the first system."""
    lines, base = ["| system | encoder, s | ratio |", "| --- | --- | --- |"], np.array(next(iter(seconds.values())))
    for name, own in seconds.items():
        low, middle, high = np.quantile(base / np.array(own), (0.25, 0.5, 0.75))
        lines.append(f"| {name} | {np.median(own):.3g} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, **changes: Any) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint and the export are kept")
    parser.add_argument("--side", type=int, nargs="+", default=[256, 512], help="of the picture, in pixels")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    if not (args.work / "checkpoint").is_dir():
        make(args.work / "checkpoint", **changes)
    if not (args.work / "vision_encoder.onnx").is_file():
        export(args.work / "checkpoint", args.work / "vision_encoder.onnx")
    config, systems = load(args.work, args.threads)
    for side in args.side:
        shown = picture(config, side)
        own, gold = systems["ours-fp32"](shown), systems["transformers"](shown)
        torch.testing.assert_close(own, gold, rtol=1e-3, atol=1e-4 * float(gold.abs().max()))
        print(f"\n{side} pixels\n\n{table(take_turns(systems, shown, args.rounds))}", flush=True)


if __name__ == "__main__":
    main()

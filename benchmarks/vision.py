"""Measure a model of LFM2-VL-450M's shape: one picture of 512 x 512, then text.

`python -m benchmarks.vision --work FOLDER` makes a checkpoint with random weights, exports it, and prints a table. The
systems are transformers in torch, the exported files in each precision, and those in 4 bits in onnxruntime-genai. All
of them stay loaded. Every round runs each of them in turn, in an order of its own. Ratios to the first system are taken
within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Lfm2VlConfig
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlForConditionalGeneration

from benchmarks.checkpoint import add_tokenizer, save_seeded
from benchmarks.encoders import SHAPE as TEXT
from benchmarks.turns import shuffled
from optimum_lfm2.compat import picture_features


# Siglip2's base tower for pictures of any size (NaFlex), and the projector, as LFM2-VL-450M's config.json has them.
TOWER = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_patches": 256,
    "patch_size": 16,
    "vision_use_head": False,
}
IMAGE = 4
PROJECTOR = {"projector_hidden_size": 2560, "image_token_id": IMAGE}
# Tokens of the demo's tokenizer that its texts do not use, and what they are in LFM2-VL's. `<image>` has the id IMAGE.
RENAMED = {"<|fim_pre|>": "<|image_start|>", "<|fim_mid|>": "<image>", "<|fim_suf|>": "<|image_end|>"}
PROCESSOR = {"image_processor_type": "Lfm2VlImageProcessorFast", "processor_class": "Lfm2VlProcessor"}
DTYPES = {"transformers": torch.float32, "transformers-bf16": torch.bfloat16}
VARIANTS = {"ours-fp32": "default", "ours-q8": "q8", "ours-q4": "q4"}
GENAI = "genai-q4"
SYSTEMS = (*DTYPES, *VARIANTS, GENAI)


@dataclass(frozen=True)
class System:
    """A loaded system: `generate` makes as many tokens as it is told, and `encode` features of the picture.

    onnxruntime-genai does not say when it encodes: its `encode` is None.
    """

    generate: Callable[[int], torch.Tensor]
    encode: Callable[[], Any] | None


@dataclass(frozen=True)
class Turn:
    """What a system took in a round: seconds of the encoder, seconds to the first token, seconds for each later one."""

    encoder: float | None
    first: float
    token: float


def make(path: Path, **changes: Any) -> Path:
    """Save a checkpoint with seeded random weights. `changes` are options of `Lfm2VlConfig`."""
    options = {"text_config": {**TEXT, "block_multiple_of": 256}, "vision_config": TOWER, **PROJECTOR, **changes}
    save_seeded(path, Lfm2VlForConditionalGeneration, Lfm2VlConfig(**options))
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for file in add_tokenizer(path).glob("*token*.json"):
        text = file.read_text(encoding="utf-8")
        for old, new in RENAMED.items():
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")
    return path


def prepare(work: Path, names: Sequence[str], **changes: Any) -> None:
    """Make the checkpoint and the exports that are not there yet, under `work`."""
    from optimum.exporters.onnx import main_export

    if not (work / "checkpoint").is_dir():
        make(work / "checkpoint", **changes)
    for name in names:
        if name in VARIANTS and not (work / name).is_dir():
            main_export(str(work / "checkpoint"), work / name, variant=VARIANTS[name], do_validation=False)


def question(config: Lfm2VlConfig, side: int, words: int) -> dict[str, torch.Tensor]:
    """A prompt as the processor gives it: a square picture of `side` pixels, and so many tokens of text."""
    generator = torch.Generator().manual_seed(0)
    vision = config.vision_config
    patches = side // vision.patch_size
    ids = torch.randint(8, config.text_config.vocab_size, (1, words), generator=generator)
    ids = ids.masked_fill(ids == config.image_token_id, 8)
    places = torch.full((1, (patches // config.downsample_factor) ** 2), config.image_token_id)
    ids = torch.cat([ids[:, : words // 2], places, ids[:, words // 2 :]], dim=1)
    width = vision.num_channels * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(1, patches**2, width, generator=generator) * 2 - 1,
        "pixel_attention_mask": torch.ones(1, patches**2, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[patches, patches]]),
    }


def load(name: str, work: Path, threads: int, side: int, words: int) -> System:
    """Load one of `SYSTEMS`. The arguments from `side` on are those of `question`."""
    if name == GENAI:
        return _genai(work / "ours-q4", threads, side, words)
    torch.set_num_threads(threads)
    if name in DTYPES:
        model: Any = AutoModelForImageTextToText.from_pretrained(work / "checkpoint", dtype=DTYPES[name]).eval()
    else:
        model = _exported(work / name, threads)
    given = question(model.config, side, words)
    if name in DTYPES:
        given["pixel_values"] = given["pixel_values"].to(DTYPES[name])
    picture = {key: value for key, value in given.items() if key not in ("input_ids", "attention_mask")}
    length = given["input_ids"].shape[1]

    @torch.inference_mode()
    def encode() -> Any:
        return picture_features(model, picture) if name in DTYPES else model.get_image_features(**picture)

    @torch.inference_mode()
    def generate(new: int) -> torch.Tensor:
        limits = {"max_new_tokens": new, "min_new_tokens": new}
        return model.generate(**given, **limits, do_sample=False, pad_token_id=0)[:, length:]

    return System(generate, encode)


def _genai(folder: Path, threads: int, side: int, words: int) -> System:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    own = {"session_options": {"intra_op_num_threads": threads}}  # by default it takes one here
    config.overlay(json.dumps({"model": dict.fromkeys(("decoder", "embedding", "vision"), own)}))
    model = og.Model(config)
    picture = folder / "picture.png"
    picture.write_bytes(_white(side))
    prompt = f"<image>{' key' * (words - 2)}"  # two tokens stand around the picture's
    given = model.create_multimodal_processor()(prompt, images=og.Images.open(str(picture)))
    length = given["input_ids"].shape()[1]

    def generate(new: int) -> torch.Tensor:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=length + new, min_length=length + new, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.set_inputs(given)
        for _ in range(new):
            generator.generate_next_token()
        return torch.tensor(generator.get_sequence(0)[length:])[None]

    return System(generate, None)


def _white(side: int) -> bytes:
    """Return the PNG file of a white square."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress((b"\0" + b"\xff" * 3 * side) * side),
        b"IEND": b"",
    }
    parts = (struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x)) for k, x in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _exported(folder: Path, threads: int) -> Any:
    import onnxruntime

    from optimum_lfm2 import ORTLfm2VlForConditionalGeneration

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return ORTLfm2VlForConditionalGeneration.from_pretrained(folder, session_options=options)


def take_turns(systems: dict[str, System], new: int, rounds: int) -> dict[str, list[Turn]]:
    """What each system took in each round. One round more comes first, which pages the weights in."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def turn(system: System) -> Turn:
        first, whole = seconds(lambda: system.generate(1)), seconds(lambda: system.generate(1 + new))
        encoder = None if system.encode is None else seconds(system.encode)
        return Turn(encoder, first, (whole - first) / new)

    turns: dict[str, list[Turn]] = {name: [] for name in systems}
    orders = random.Random(0)
    for _ in range(rounds + 1):
        for name in shuffled(systems, orders):
            turns[name].append(turn(systems[name]))
    return {name: own[1:] for name, own in turns.items()}


def table(turns: dict[str, list[Turn]]) -> str:
    """Medians, and the quartiles of the ratios: how many times as fast as the first system."""
    columns = {"encoder": "encoder, s", "first": "first token, s", "token": "then tokens/s"}
    lines = [f"| system | {' | '.join(f'{title} | ratio' for title in columns.values())} |", "| --- " * 7 + "|"]
    baseline = next(iter(turns.values()))
    for name, own in turns.items():
        cells = [name]
        for field in columns:
            times = [getattr(turn, field) for turn in own]
            if None in times:
                cells += ["", ""]
                continue
            ratios = [getattr(base, field) / time for base, time in zip(baseline, times, strict=True)]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            median = float(np.median(times))
            cells.append(f"{1 / median:.1f}" if field == "token" else f"{median:.3g}")
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, **changes: Any) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint and its exports are kept")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--words", type=int, default=32, help="tokens of text around the picture")
    parser.add_argument("--new", type=int, default=24, help="tokens after the first one")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    names = args.systems.split(",")
    prepare(args.work, names, **changes)
    systems = {name: load(name, args.work, args.threads, args.side, args.words) for name in names}
    print(table(take_turns(systems, args.new, args.rounds)), flush=True)


if __name__ == "__main__":
    main()

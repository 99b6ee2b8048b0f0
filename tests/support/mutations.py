"""Seeded mutations of a good checkpoint: what goes wrong on disks, in downloads and in editors, by the dozen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


Spoil = Callable[[Path], None]

VALUES = (None, "seven", -1, 0, 10**9, 1e9, [], [1], True, {}, 0.5, "")
GENAI = "genai_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
NOTES = ("_from_model_config", "transformers_version")
TEXTS = {"empty": "", "list": "[]", "null": "null", "object": "{}", "number": "7", "binary": "\ufffd\0"}


def mutations(checkpoint: Path) -> Iterator[tuple[str, Spoil]]:
    """A name and what spoils a copy of the checkpoint, for each mutation that leaves the model type readable.

    `untellable` has the others.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    for key in sorted(config.keys() - {"model_type"}):
        yield f"config.json without {key}", _json("config.json", lambda data, key=key: data.pop(key))
        for value in VALUES:
            yield f"config.json {key}={value!r}", _json("config.json", _setting(key, value))
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    for key in sorted({*generation, "temperature", "top_k", "do_sample"}):
        # Each value of a note, which nothing computes with, would be another right export.
        for value in VALUES if key not in NOTES else VALUES[:2]:
            yield f"generation_config.json {key}={value!r}", _json("generation_config.json", _setting(key, value))
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            yield from _spoiled_texts(name)
    yield from _weights()
    yield from _indices()


def untellable(checkpoint: Path) -> Iterator[tuple[str, Spoil]]:
    """Mutations after which nothing tells that the model is ours.

    `export onnx` leaves such a model to Optimum, whose errors are Optimum's own. `export lfm2` must say what is wrong.
    """
    yield "config.json missing", lambda folder: (folder / "config.json").unlink()
    yield "config.json without model_type", _json("config.json", lambda data: data.pop("model_type"))
    for value in VALUES:
        yield f"config.json model_type={value!r}", _json("config.json", _setting("model_type", value))
    yield from _spoiled_texts("config.json")
    yield "config.json deep", _bytes("config.json", lambda data: b"[" * 100_000)


def export_mutations(export: Path) -> Iterator[tuple[str, Spoil]]:
    """The same for an exported folder, whose configuration and graphs the runtime reads."""
    config = json.loads((export / "config.json").read_text())
    for key in sorted(config.keys() - {"model_type"}):
        yield f"config.json without {key}", _json("config.json", lambda data, key=key: data.pop(key))
        for value in VALUES:
            yield f"config.json {key}={value!r}", _json("config.json", _setting(key, value))
    for name in ("generation_config.json", "model.onnx"):
        yield from _spoiled_texts(name)
    yield "model.onnx_data cut", _bytes("model.onnx_data", lambda data: data[:1000])
    yield "model.onnx_data missing", lambda folder: (folder / "model.onnx_data").unlink()
    yield from _genai_mutations(export)


def _genai_mutations(export: Path) -> Iterator[tuple[str, Spoil]]:
    for name, spoil in _spoiled_texts("model.onnx"):
        yield f"genai folder, {name}", _without_config(spoil)
    model = json.loads((export / GENAI).read_text())["model"]
    for path in (*((key,) for key in model if key != "type"), *(("decoder", key) for key in model["decoder"])):
        for value in VALUES:
            yield f"{GENAI} {'.'.join(path)}={value!r}", _without_config(_json(GENAI, _nested(path, value)))


def untellable_exports() -> Iterator[tuple[str, Spoil]]:
    """Folders of onnxruntime-genai that nothing tells to be ours. Our own class must say what is wrong."""
    for name, spoil in _spoiled_texts(GENAI):
        yield name, _without_config(spoil)
    for value in VALUES:
        yield f"{GENAI} type={value!r}", _without_config(_json(GENAI, _nested(("type",), value)))


def _without_config(spoil: Spoil) -> Spoil:
    """A folder as onnxruntime-genai's builder writes it has no config.json."""

    def both(folder: Path) -> None:
        (folder / "config.json").unlink()
        spoil(folder)

    return both


def _nested(path: tuple[str, ...], value: Any) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        inner = data["model"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def _spoiled_texts(name: str) -> Iterator[tuple[str, Spoil]]:
    yield f"{name} cut", _bytes(name, lambda data: data[: len(data) // 2])
    for kind, text in TEXTS.items():
        yield f"{name} {kind}", _bytes(name, lambda data, text=text: text.encode())


def _weights() -> Iterator[tuple[str, Spoil]]:
    generator = random.Random(0)
    for size in (0, 4, 8, 9, 100, -1, -100):
        yield f"model.safetensors cut to {size}", _bytes("model.safetensors", lambda data, size=size: data[:size])
    for size in (1, 1000):
        yield f"model.safetensors grown by {size}", _bytes("model.safetensors", lambda d, size=size: d + b"\7" * size)
    for _ in range(60):
        position, bit = generator.randrange(0, 2000), generator.randrange(8)

        def flip(data: bytes, position: int = position, bit: int = bit) -> bytes:
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            return bytes(changed)

        yield f"model.safetensors bit {bit} of byte {position}", _bytes("model.safetensors", flip)


def _indices() -> Iterator[tuple[str, Spoil]]:
    texts = {
        **TEXTS,
        "no map": '{"metadata": {}}',
        "map list": '{"weight_map": []}',
        "map empty": '{"weight_map": {}}',
        "map of numbers": '{"weight_map": {"model.embed_tokens.weight": 7}}',
        "map out of the folder": '{"weight_map": {"model.embed_tokens.weight": "../good/model.safetensors"}}',
        "map to an absolute path": '{"weight_map": {"model.embed_tokens.weight": "/etc/model.safetensors"}}',
        "map to nothing": '{"weight_map": {"model.embed_tokens.weight": "other.safetensors"}}',
        "map of a part": '{"weight_map": {"model.embed_tokens.weight": "a.safetensors"}}',
        "deep": "[" * 100_000,
    }
    for kind, text in texts.items():

        def spoil(folder: Path, text: str = text) -> None:
            (folder / "model.safetensors").rename(folder / "a.safetensors")
            (folder / "model.safetensors.index.json").write_text(text)

        yield f"index {kind}", spoil


def _setting(key: str, value: Any) -> Callable[[dict], None]:
    return lambda data: data.update({key: value})


def _json(name: str, change: Callable[[dict], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return spoil


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))

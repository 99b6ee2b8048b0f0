"""Measure an encoder of LFM2.5-Embedding-350M's shape: documents a second, by length and batch size.

`python -m benchmarks.encoders --work FOLDER` makes a checkpoint with random weights, exports it in fp32 and q8, and
prints a row for each system. The systems are transformers' modules in torch, the exported files in Optimum, and
sentence-transformers with its torch backend and with its onnx backend. A document is cut to its length in tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, Lfm2Config

from benchmarks.checkpoint import add_tokenizer


SHAPE = {
    "vocab_size": 65536,
    "hidden_size": 1024,
    "intermediate_size": 6656,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
}
VARIANTS = {"fp32": "default", "q8": "q8"}
SYSTEMS = ("torch", "ours-fp32", "ours-q8", "st-torch", "st-fp32", "st-q8")
WORDS = "Once upon a time there was a girl named Nora who put a silver key next to the well and went home . "
# The code of the checkpoint, with which sentence-transformers loads it in torch.
CODE = """\
from optimum_lfm2.families.bidirectional import Lfm2BidirectionalModel as Reference


class Lfm2BidirectionalModel(Reference):
    pass
"""

# Takes texts of one batch, and encodes them.
Encode = Callable[[list[str]], Any]


def make(path: Path, **changes: Any) -> Path:
    """Save a checkpoint with seeded random weights and the files of sentence-transformers."""
    from optimum_lfm2.families.bidirectional import Lfm2BidirectionalModel

    torch.manual_seed(0)
    model = Lfm2BidirectionalModel(Lfm2Config(**{**SHAPE, **changes}))
    model.config.architectures = ["Lfm2BidirectionalModel"]
    model.config.auto_map = {"AutoModel": "modeling.Lfm2BidirectionalModel"}
    model.config.save_pretrained(path)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "modeling.py").write_text(CODE)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{name}"}
        for i, (folder, name) in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed))
    for folder, settings in (
        ("1_Pooling", {"word_embedding_dimension": model.config.hidden_size, "pooling_mode_cls_token": True}),
        ("2_Normalize", {}),
    ):
        (path / folder).mkdir()
        (path / folder / "config.json").write_text(json.dumps(settings))
    return add_tokenizer(path)


def prepare(work: Path, **changes: Any) -> dict[str, Path]:
    """Make the checkpoint and its exports where they are not there yet. Return their folders."""
    from optimum.exporters.onnx import main_export

    import optimum_lfm2  # noqa: F401  before Optimum

    folders = {"torch": work / "checkpoint", **{name: work / name for name in VARIANTS}}
    if not folders["torch"].is_dir():
        make(folders["torch"], **changes)
    for name, variant in VARIANTS.items():
        if not folders[name].is_dir():
            main_export(str(folders["torch"]), folders[name], variant=variant, do_validation=False)
    return folders


def load(system: str, folders: dict[str, Path], tokens: int, threads: int) -> Encode:
    """Load a system, one of `SYSTEMS`, that cuts its texts to `tokens`."""
    import onnxruntime

    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    name = system.split("-")[-1]
    if system.startswith("st-"):
        from sentence_transformers import SentenceTransformer

        if name == "torch":
            model = SentenceTransformer(str(folders["torch"]), trust_remote_code=True, device="cpu")
        else:
            settings = {"provider": "CPUExecutionProvider", "session_options": options}
            model = SentenceTransformer(str(folders[name]), backend="onnx", model_kwargs=settings, device="cpu")
        model.max_seq_length = tokens
        return lambda texts: model.encode(texts, batch_size=len(texts), show_progress_bar=False)
    tokenizer = AutoTokenizer.from_pretrained(folders["torch"])
    encoder = _reference(folders["torch"]) if name == "torch" else _optimum(folders[name], options)

    @torch.inference_mode()
    def encode(texts: list[str]) -> Any:
        batch = tokenizer(texts, truncation=True, max_length=tokens, padding=True, return_tensors="pt")
        return encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0][:, 0]

    return encode


def _reference(folder: Path) -> Any:
    from safetensors.torch import load_file

    from optimum_lfm2.families.bidirectional import Lfm2BidirectionalModel

    model = Lfm2BidirectionalModel._from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def _optimum(folder: Path, options: Any) -> Any:
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    return ORTModelForFeatureExtraction.from_pretrained(folder, session_options=options)


def speeds(encode: Encode, tokens: int, rows: int, rounds: int) -> list[float]:
    """Documents a second, of each round. The first call is not counted."""
    texts = [WORDS[i:] + WORDS * tokens for i in range(rows)]
    measured = []
    encode(texts[:1])
    for _ in range(rounds):
        start = time.perf_counter()
        encode(texts)
        measured.append(rows / (time.perf_counter() - start))
    return measured


def main(arguments: list[str] | None = None, **changes: Any) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint and its exports are kept")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    folders = prepare(args.work, **changes)
    cases = [(tokens, rows) for tokens in args.tokens for rows in args.rows]
    print("| system |", " | ".join(f"{tokens} tokens, batch {rows}" for tokens, rows in cases), "|", flush=True)
    print("| --- |", " | ".join("---" for _ in cases), "|", flush=True)
    for system in args.systems.split(","):
        cells = []
        for tokens, rows in cases:
            encode = load(system, folders, tokens, args.threads)
            found = speeds(encode, tokens, rows, args.rounds)
            cells.append(f"{statistics.median(found):.3g} [{min(found):.3g} to {max(found):.3g}]")
            del encode
            gc.collect()
        print(f"| {system} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()

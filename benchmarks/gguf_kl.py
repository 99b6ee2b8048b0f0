"""How far an export of a GGUF file is from the file, beside llama.cpp's own run of it: `python -m benchmarks.gguf_kl`.

The gold is transformers in float32 with the weights of the file, as transformers dequantises them. llama.cpp continues
prompts greedily. All others read the same ids: a prompt in one call, then token by token. The KL divergence of the next
token's distribution is taken both ways. `demo` is the trained checkpoint of this repository with prompts from its
held-out text. `350m` has LFM2-350M's shape, seeded weights and random prompts: its q norms are five times as large, so
that attention picks, and its last norm too, so that some tokens are likely.

llama.cpp is the package xllamacpp (`pip install xllamacpp`), which also has its quantiser.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench import say
from benchmarks.checkpoint import random_checkpoint
from benchmarks.gguf_files import MIXES, ggml_quantiser, write_gguf
from benchmarks.quality import CHECKPOINT, read_chunks
from benchmarks.systems.llama import LlamaCpp


FACTORS = {"demo": {}, "350m": {"attn_q_norm": 5, "token_embd_norm": 5}}
IN_FLOAT = "in_float.onnx"
EXPORT = ("-m", "optimum.commands.optimum_cli", "export", "onnx")


@dataclass(frozen=True)
class Text:
    """A prompt, and how llama.cpp goes on.

    Attributes:
        prompt: its ids.
        new: the ids that llama.cpp chose.
        found: llama.cpp's log-probabilities for each of `new`, float64 (new, vocabulary).
    """

    prompt: list[int]
    new: list[int]
    found: torch.Tensor


def go_on(llama: LlamaCpp, prompt: list[int], new: int) -> Text:
    """Continue a prompt greedily by llama.cpp."""
    tokens, found = llama.distributions(prompt, new)
    # A probability of 0 is not written as a finite number.
    return Text(prompt, tokens, torch.from_numpy(found).clamp(min=-200).log_softmax(-1))


def gold_of(checkpoint: Path, path: Path) -> Any:
    """Return transformers' model with the weights that transformers reads from the file."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # The configuration is the checkpoint's. transformers makes the feed-forward narrower than the file says.
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).float().eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    state = {name: torch.as_tensor(tensor) for name, tensor in read.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"transformers reads other tensors: {missing[:3]}, {unexpected[:3]}")
    return model


def export(path: Path, folder: Path) -> int:
    """Run `optimum-cli export onnx` in a process of its own. Return its peak memory in bytes."""
    # The words of the file stand for ids, and make no tokenizer.
    command = [sys.executable, *EXPORT, "--model", str(path), "--tokenizer", str(CHECKPOINT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def load(folder: Path, in_float: bool) -> Any:
    """Return an export as it is, or with activations in float."""
    import onnx_ir as ir

    from optimum_lfm2 import ORTLfm2ForCausalLM
    from optimum_lfm2.validation.pieces import keep_activations_float

    if in_float:
        model = ir.load(folder / "model.onnx")
        keep_activations_float(model.graph)
        ir.save(model, folder / IN_FLOAT)
    return ORTLfm2ForCausalLM.from_pretrained(folder, file_name=IN_FLOAT if in_float else "model.onnx")


def read(model: Any, text: Text) -> torch.Tensor:
    """Return a system's log-probabilities where llama.cpp's are, float64 (new, vocabulary)."""
    from optimum_lfm2 import compat

    cache, logits = None, []
    for ids in (text.prompt, *([token] for token in text.new[:-1])):
        out = model(input_ids=torch.tensor([ids]), **{compat.CACHE: cache})
        cache = out[compat.CACHE]
        logits.append(out.logits[0, -1].double())
    return torch.stack(logits).log_softmax(-1)


@torch.no_grad()
def read_gold(model: Any, text: Text) -> torch.Tensor:
    """The same of transformers, which reads all ids at once, without a cache."""
    ids = torch.tensor([text.prompt + text.new[:-1]])
    return model(input_ids=ids, use_cache=False).logits[0, -len(text.new) :].double().log_softmax(-1)


def continued(model: Any, text: Text) -> list[int]:
    """Return the ids with which a system goes on greedily."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": len(text.new)}
    return model.generate(torch.tensor([text.prompt]), **settings)[0, len(text.prompt) :].tolist()


def row(gold: torch.Tensor, own: torch.Tensor, same_texts: int, texts: int) -> str:
    """Return the cells of a system: divergences from the gold and of the gold from it, and agreement."""
    cells = []
    for a, b in ((gold, own), (own, gold)):
        each = (a.exp() * (a - b)).sum(-1)
        cells.append(f"{each.mean():.6f} ± {each.std() / len(each) ** 0.5:.6f}")
    agreement = float((gold.argmax(-1) == own.argmax(-1)).double().mean())
    return " | ".join([*cells, f"{agreement:.1%}", f"{same_texts} of {texts}"])


def prompts(model: str, count: int) -> list[list[int]]:
    """Return prompts of 8 to 71 ids."""
    random = np.random.default_rng(0)
    lengths = random.integers(8, 72, count)
    if model == "demo":
        return [ids[:length] for ids, length in zip(read_chunks(count, 128), lengths, strict=True)]
    return [random.integers(8, 65536, length).tolist() for length in lengths]


def compare(path: Path, folder: Path, checkpoint: Path, asked: Sequence[list[int]], new: int, threads: int) -> Iterator:
    """Yield the name and the cells of each system."""
    gold_model = gold_of(checkpoint, path)
    llama = LlamaCpp(path, threads, length=1024)
    texts = [go_on(llama, prompt, new) for prompt in asked]
    del llama
    gold = torch.cat([read_gold(gold_model, text) for text in texts])
    # Without a cache, since transformers 4 fills that of a short prompt wrongly.
    gold_model.generation_config.use_cache = False
    wanted = [continued(gold_model, text) for text in texts]
    yield "llama.cpp", row(gold, torch.cat([t.found for t in texts]), _same(wanted, [t.new for t in texts]), len(texts))
    for name, in_float in (("export", False), ("export, activations in float", True)):
        model = load(folder, in_float)
        own = torch.cat([read(model, text) for text in texts])
        yield name, row(gold, own, _same(wanted, [continued(model, text) for text in texts]), len(texts))


def _same(wanted: Sequence[list[int]], own: Sequence[list[int]]) -> int:
    return sum(a == b for a, b in zip(wanted, own, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, default=Path(".benchmarks"), help="folder for the models (3 GB with 350m)")
    add("--models", nargs="+", choices=FACTORS, default=list(FACTORS))
    add("--files", nargs="+", choices=MIXES, default=list(MIXES))
    add("--prompts", type=int, default=32, help="of each model")
    add("--new", type=int, default=8, help="tokens after each prompt")
    add("--threads", type=int, default=1, help="of llama.cpp")
    args = parser.parse_args(argv)
    try:
        say(f"llama.cpp of xllamacpp {version('xllamacpp')}")
    except PackageNotFoundError:
        parser.error("llama.cpp is not installed: pip install xllamacpp")

    quantise = ggml_quantiser()
    print(
        "| model | file | system | KL from the gold | KL of the gold | same top token | same text |\n"
        + "| --- " * 7
        + "|"
    )
    for model in args.models:
        checkpoint = CHECKPOINT if model == "demo" else random_checkpoint(args.work)
        asked = prompts(model, args.prompts)
        for mix in args.files:
            path = args.work / "gguf" / f"{model}.{mix}.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(checkpoint, path, MIXES[mix], quantise, factors=FACTORS[model])
            peak = export(path, path.with_suffix(""))
            say(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, exported in {peak / 1e6:.0f} MB of memory at most")
            for name, cells in compare(path, path.with_suffix(""), checkpoint, asked, args.new, args.threads):
                print(f"| {model} | {mix} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

"""What `test_others_untouched` runs in a process of its own: others' models, exported and loaded.

    python others.py with|without MODELS

Every result is a file's hash, tokens or an error; they are printed as JSON. `without` hides this package from Python.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.util
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


OURS = ("optimum_lfm2", "optimum.commands.lfm2")
REGISTERED = "optimum.commands.register.register_lfm2"  # optimum-cli imports it by its file: here it is empty


class Hidden(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> Any:
        if name == REGISTERED:
            return importlib.util.spec_from_loader(name, self)
        if name.startswith(OURS):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return None

    def exec_module(self, module: Any) -> None:
        pass


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the error that it raises with those it was made of."""
    try:
        return work()
    except BaseException as error:  # SystemExit too
        chain: list[str] = []
        raised: BaseException | None = error
        while raised is not None:
            chain.append(f"{type(raised).__name__}: {raised}")
            raised = raised.__cause__
        return {"error": chain}


def hashes(folder: str) -> dict[str, str]:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def exported(model: Path, task: str, **options: Any) -> dict[str, str]:
    from optimum.exporters.onnx import main_export

    name = f"{model.name}-{task}"
    main_export(str(model), name, task=task, **options)
    return hashes(name)


def remote_code(model: Path, trust: bool) -> dict[str, str]:
    from optimum.exporters.onnx.model_configs import BertOnnxConfig
    from transformers import BertConfig

    config = BertOnnxConfig(BertConfig.from_pretrained(model.parent / "bert"), task="feature-extraction")
    options = {"custom_onnx_configs": {"model": config}, "library_name": "transformers"}
    return exported(model, "feature-extraction", trust_remote_code=trust, **options)


def features(folder: str) -> list[float]:
    import torch
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    ids = torch.tensor([[3, 4, 5]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return ORTModelForFeatureExtraction.from_pretrained(folder)(**inputs).last_hidden_state.flatten().tolist()


def text(*args: Any, **options: Any) -> list[int]:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(*args, **options)
    return [
        type(model).__name__,
        *model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=8, do_sample=False)[0].tolist(),
    ]


def tokens(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)("a b").input_ids


def command(*words: object) -> dict[str, str]:
    from optimum.commands.optimum_cli import main

    sys.argv = ["optimum-cli", "export", "onnx", "--model", *map(str, words)]
    main()
    return hashes(str(words[1]))


def results(models: Path) -> dict[str, Any]:
    llama, bert, remote = models / "llama", models / "bert", models / "remote"
    named = [path for path in sorted(models.iterdir()) if path.name.startswith("no-")]
    todo: dict[str, Callable[[], Any]] = {
        "remote code, trusted": lambda: remote_code(remote, True),
        "remote code, not trusted": lambda: remote_code(remote, False),
        "remote code, trusted, by the command": lambda: command(
            remote, "cli-remote", "--task", "feature-extraction", "--trust-remote-code"
        ),
        "llama": lambda: exported(llama, "text-generation-with-past"),
        "llama, task to be found": lambda: exported(llama, "auto"),
        "llama, by the command": lambda: command(llama, "cli-llama", "--task", "text-generation-with-past"),
        "llama, loaded": lambda: text("llama-text-generation-with-past"),
        "llama, loaded by position": lambda: text(
            "llama-text-generation-with-past", None, False, "", "main", False, True
        ),
        "llama, exported while it loads": lambda: text(llama, export=True),
        "llama, an unknown argument": lambda: text("llama-text-generation-with-past", nonsense=1),
        "llama, a call without a model": lambda: text(),
        "llama, a call with an argument twice": lambda: text("llama", model_id="llama"),
        "bert": lambda: exported(bert, "feature-extraction"),
        "bert, by the command": lambda: command(models / "bert-lm", "cli-bert", "--task", "fill-mask"),
        "bert, a task that it has not": lambda: exported(bert, "text-generation-with-past"),
        "bert, loaded": lambda: features("bert-feature-extraction"),
        "diffusers": lambda: exported(models / "diffusion", "text-to-image"),
        "diffusers, by name": lambda: exported(models / "diffusion", "text-to-image", library_name="diffusers"),
        "diffusers, by the command": lambda: command(models / "diffusion", "cli-diffusion", "--task", "text-to-image"),
        "diffusers, as a decoder": lambda: text(models / "diffusion"),
        "a tokenizer of transformers 5": lambda: tokens(models / "no-such-tokenizer"),
    }
    for path in [*named, models / "nowhere"]:
        todo |= {
            f"{path.name}, exported": lambda path=path: exported(path, "text-generation"),
            f"{path.name}, by the command": lambda path=path: command(path, f"cli-{path.name}"),
            f"{path.name}, loaded": lambda path=path: text(path),
            f"{path.name}, read": lambda path=path: tokens(path),
        }
    return {name: outcome(work) for name, work in todo.items()}


def main() -> None:
    mode, models = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if mode == "without":
        sys.meta_path.insert(0, Hidden())
    else:
        import optimum_lfm2  # noqa: F401
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = results(models)
    found["ours is loaded"] = "optimum_lfm2" in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()

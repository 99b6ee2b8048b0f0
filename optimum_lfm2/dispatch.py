"""`ORTModelForCausalLM` loads our models as our class. Optimum gets every other call unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

from optimum.onnxruntime import ORTModelForCausalLM
from transformers.utils import CONFIG_NAME

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.loading.adapters import check_adapter
from optimum_lfm2.loading.config_check import check_fields, has_null_quantization, loaded_config, mend
from optimum_lfm2.loading.gguf import is_gguf, standing_in
from optimum_lfm2.loading.source import HUB
from optimum_lfm2.modeling import ORTLfm2ForCausalLM
from optimum_lfm2.sidecars.genai_config import GENAI_CONFIG, is_of_our_type, read_genai_config


GGUF_ARGUMENTS = ("gguf_file", "tokenizer")


def _genai_folder(cls: type, model_id: Any, subfolder: str = "", **_: Any) -> Path | None:
    """Return the local folder that has a genai_config.json and no config.json; None where there is none.

    Optimum refuses such a folder. `ORTModelForCausalLM` itself loads it only if the file names a model of ours.
    """
    folders = [Path(model_id, subfolder), Path(model_id)]
    if any((folder / CONFIG_NAME).is_file() for folder in folders):
        return None
    found = [folder for folder in folders if (folder / GENAI_CONFIG).is_file()]
    if not found or (cls is not ORTLfm2ForCausalLM and not is_of_our_type(found[0] / GENAI_CONFIG)):
        return None
    return found[0]


def _check_config(path: Path, model_types: Collection[str]) -> dict[str, Any]:
    """Refuse a local model of ours with an impossible config.json, before transformers reads it.

    Returns:
        What to hand on: the configuration, where transformers itself cannot read it.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # it may be anybody's, so Optimum says what is wrong
    if isinstance(written, dict) and written.get("model_type") in list(model_types):
        member = member_of(written)
        if member.in_parts:  # whether a graph is an encoder's, its layout says
            member.check_loader(ORTLfm2ForCausalLM.__name__, path.parent)
        check_fields(written, str(path))
        config = loaded_config(path.parent)
        return {"config": config} if has_null_quantization(written) else {}
    return {}


def dispatch(model_types: Collection[str]) -> None:
    """Make `ORTModelForCausalLM` itself load and export these model types as `ORTLfm2ForCausalLM`.

    Every other model, and every other class, goes to Optimum's methods with unchanged arguments. The wrapped methods
    raise `Lfm2Error` for a local folder of ours that is wrong.

    Args:
        model_types: our types, as in config.json. It is read at each call.
    """
    ORTModelForCausalLM.from_pretrained = classmethod(  # type: ignore[assignment]
        _checking_folders(ORTModelForCausalLM.from_pretrained.__func__, model_types)
    )
    for name in ("_from_pretrained", "_export"):
        original = getattr(ORTModelForCausalLM, name).__func__
        setattr(ORTModelForCausalLM, name, classmethod(_dispatching(original, model_types)))


def _checking_folders(original: Callable[..., Any], model_types: Collection[str]) -> Callable[..., Any]:
    parameters = signature(original)

    @wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        folder, read, gguf = None, {}, False
        if cls in (ORTModelForCausalLM, ORTLfm2ForCausalLM):
            with suppress(TypeError):  # the call lacks an argument or has one too many: Optimum says so
                given = parameters.bind(cls, *args, **kwargs).arguments
                gguf = is_gguf(given["model_id"], given.get("kwargs", {}).get("gguf_file"))
                check_adapter(Path(given["model_id"]))
                path = Path(given["model_id"], given.get("subfolder") or "", CONFIG_NAME)
                read = _check_config(path, model_types)
                if read and given.get("export") and not compat.READS_NULL_QUANTIZATION:
                    raise Lfm2Error(
                        f"quantization_config in {path} is null, which this transformers cannot read. Export it with "
                        "optimum-cli export onnx, and load the folder; or remove the entry."
                    )
                if not given.get("config") and not given.get("export"):
                    folder = _genai_folder(**given)
        if gguf:
            return _exported_gguf(original, **given)
        if folder is None:
            return original(cls, *args, **{**read, **kwargs})
        options = {name: value for name, value in given.items() if name not in ("cls", "config", "export", "kwargs")}
        config = read_genai_config(folder)
        return ORTLfm2ForCausalLM._from_pretrained(config=config, **options, **given.get("kwargs", {}))

    return from_pretrained


def _exported_gguf(original: Callable[..., Any], cls: type, model_id: Any, kwargs: Any = None, **given: Any) -> Any:
    """Export a GGUF file, and load the result. Optimum has no such option.

    Args:
        original: Optimum's `from_pretrained`.
        kwargs: its own keyword arguments, with `gguf_file` and `tokenizer` as `loading.gguf.standing_in` takes them.
    """
    rest = dict(kwargs or {})
    own = {name: rest.pop(name, None) for name in GGUF_ARGUMENTS}
    hub = {name: given[name] for name in HUB if given.get(name) is not None}
    with standing_in(model_id, **own, **hub) as folder:
        elsewhere = {name: value for name, value in given.items() if name not in (*HUB, "export")}
        return original(cls, folder, export=True, **elsewhere, **rest)


def _dispatching(original: Callable[..., Any], model_types: Collection[str]) -> Callable[..., Any]:
    @wraps(original)
    def method(cls: type, *args: Any, **kwargs: Any) -> Any:
        config: Any = kwargs.get("config", args[1] if len(args) > 1 else None)
        ours = getattr(config, "model_type", None) in model_types
        if ours and original.__name__ == "_export" and issubclass(cls, ORTModelForCausalLM):
            mend(config)  # transformers read it, and `save_pretrained` writes it beside the graph
        if ours and cls is ORTModelForCausalLM:
            return getattr(ORTLfm2ForCausalLM, original.__name__)(*args, **kwargs)
        return original(cls, *args, **kwargs)

    return method

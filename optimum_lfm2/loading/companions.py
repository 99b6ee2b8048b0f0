"""Read a checkpoint's generation settings and its tokenizer. Optimum 2.1 leaves broken ones out without an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from optimum_lfm2.errors import Lfm2Error, read_object


TOKENIZER = "tokenizer.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
WHOLE = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k")
FLAGS = ("do_sample", "use_cache", "output_scores", "output_logits", "return_dict_in_generate")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class WrittenSettings(GenerationConfig):
    """Generation settings that are saved as their file has them, byte for byte.

    transformers loads some files that it refuses to save, such as a temperature beside `do_sample: false`. Fine-tunes
    have them.

    Attributes:
        written: the contents of the file.
    """

    written = b""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GENERATION_CONFIG_NAME).write_bytes(self.written)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "written"}


def generation_settings(model_name_or_path: str, **hub: Any) -> GenerationConfig | None:
    """Read the checkpoint's `generation_config.json`. Return None where there is none.

    Args:
        hub: `subfolder`, `revision` and the like, as `transformers.utils.cached_file` takes them.

    Raises:
        Lfm2Error: for a file that cannot be read, or that transformers does not load.
    """
    path = find_file(model_name_or_path, GENERATION_CONFIG_NAME, hub)
    if path is None:
        return None
    _check_settings(path, read_object(path))
    try:
        # By its folder: of a local model transformers would read the settings beside the subfolder.
        settings: Any = WrittenSettings.from_pretrained(path.parent)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise Lfm2Error(
            f"{path} is not what transformers can use: {_one_line(error)} Correct it, or copy it again."
        ) from error
    settings.written = path.read_bytes()
    return settings


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Raise `Lfm2Error` for a setting of another type. transformers checks the types of few settings."""
    for name, value in settings.items():
        numbers = value if name == "eos_token_id" and isinstance(value, list) else [value]
        number = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in numbers)
        whole = number and all(isinstance(one, int) and -1 <= one < 2**31 for one in numbers)
        wrong = (
            (name in NUMBERS and not number)
            or (name in (*WHOLE, *TOKENS) and not whole)
            or (name in FLAGS and not isinstance(value, bool))
        )
        if wrong and value is not None:
            raise Lfm2Error(
                f"{name} in {path} is {str(value)[:60]!r}, which cannot be. Correct it, or copy the file again."
            )


def check_tokenizer(model_name_or_path: str, **hub: Any) -> None:
    """Refuse a tokenizer that cannot be loaded. Optimum would export without it.

    Raises:
        Lfm2Error: one line that names the file.
    """
    found = {name: find_file(model_name_or_path, name, hub) for name in (TOKENIZER, *TOKENIZER_SETTINGS)}
    written = {name: path for name, path in found.items() if path is not None}
    for path in written.values():
        read_object(path)
    if TOKENIZER not in written:
        return
    path = written[TOKENIZER]
    try:
        Tokenizer.from_file(str(path))
        AutoTokenizer.from_pretrained(model_name_or_path, **hub)
    except Exception as error:  # `tokenizers` has no class of its own for its errors
        raise Lfm2Error(
            f"The tokenizer beside {path} cannot be loaded ({_one_line(error)}). Download or copy its files again."
        ) from error


def find_file(model_name_or_path: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """Return a checkpoint's file, or None where it has none of this name.

    Args:
        model_name_or_path: the checkpoint's folder, or its id on the Hub.
        name: the file's name, relative to the checkpoint.
        hub: arguments of `transformers.utils.cached_file`, such as `revision`.
    """
    path = cached_file(
        model_name_or_path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if path is None else Path(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

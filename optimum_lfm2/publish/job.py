"""What `optimum-cli export lfm2` is asked for, read and checked before any work."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from optimum_lfm2.caches import CACHE_NAMES
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.options import check_atol, check_model
from optimum_lfm2.export.output import check_no_checkpoint
from optimum_lfm2.publish.card import CardOptions
from optimum_lfm2.publish.kinds import Kind, kind_of
from optimum_lfm2.publish.precisions import DEFAULT, OF_GGUF, PRECISIONS
from optimum_lfm2.quality.evaluate import read_text
from optimum_lfm2.report import WITH_PAST


TASK = "text-generation"
LEAST_COSINE = 0.99  # of an encoder in 4 bits with its checkpoint: below, the vectors find other documents


@dataclass(frozen=True)
class Job:
    """A request to `optimum-cli export lfm2`.

    Attributes:
        model: the checkpoint's folder, or its id on the Hub.
        output: the folder to write.
        precisions: keys of `PRECISIONS`.
        cache_names: the naming convention of the caches, one of `CACHE_NAMES`.
        atol: the tolerance of the check, as `validate` takes it.
        text: the text file on which the quality is measured; None measures nothing.
        chunks, length: the largest number of chunks of that text, and the tokens of a chunk.
        cache_dir: the folder of the Hub's cache; None is its default.
        card: what the user wants the model card to say.
        kind: what a folder of such a model is like.
        task: what the files are for: `text-generation-with-past`, `image-text-to-text` or the task of an encoder's
            head.
        loader: the class of this package that loads them (`Member.loader`).
        as_stored: the precisions that have the codes of a GGUF file as they are.
    """

    model: str
    output: Path
    precisions: tuple[str, ...]
    cache_names: str
    atol: float | None
    text: Path | None
    chunks: int
    length: int
    cache_dir: str | None
    card: CardOptions
    kind: Kind
    task: str
    loader: str
    as_stored: tuple[str, ...] = ()

    def variant(self, precision: str) -> str:
        """Return the variant of the export that makes a precision."""
        return "default" if precision in self.as_stored else PRECISIONS[precision].variant

    @classmethod
    def read(cls, args: Namespace, config: Mapping[str, Any], bits: int | None = None) -> Job:
        """Read the request from parsed arguments and the checkpoint's `config.json`.

        Args:
            args: the arguments.
            config: the contents of `config.json`.
            bits: of most codes of a GGUF file. None for weights in float.

        Raises:
            Lfm2Error: the request cannot work. It is refused before any work.
        """
        member = check_model(args.model, config)
        check_no_checkpoint(Path(args.output))
        kind = kind_of(member)
        if unknown := sorted(set(args.precisions or ()) - PRECISIONS.keys()):
            raise Lfm2Error(f"--precisions {' '.join(unknown)} is not known. Choose among {', '.join(PRECISIONS)}.")
        if args.cache_names not in CACHE_NAMES:
            raise Lfm2Error(f"--cache-names {args.cache_names} is not known. Choose among {', '.join(CACHE_NAMES)}.")
        if args.cache_names not in kind.cache_names:
            raise Lfm2Error(f"--cache-names {args.cache_names}: an encoder has no caches. Leave the option out.")
        if args.text is None and (risky := sorted(set(args.precisions or ()) & kind.measured)):
            raise Lfm2Error(
                f"--precisions {' '.join(risky)}: 4 bits change the vectors of an encoder. Give --text, on which the "
                f"cosine with the checkpoint is measured: {LEAST_COSINE} is asked for."
            )
        if args.text is not None:
            read_text(args.text)  # a wrong path is refused before the work
        check_atol(args.atol)
        _check_repo_id(args.repo_id)
        as_stored = () if bits is None else OF_GGUF[bits]
        default = [name for name in as_stored or DEFAULT if name not in kind.measured]
        return cls(
            args.model,
            args.output,
            tuple(name for name in PRECISIONS if name in (args.precisions or default)),
            args.cache_names,
            args.atol,
            args.text,
            args.chunks,
            args.length,
            args.cache_dir,
            CardOptions(args.repo_id, args.base_model, args.license),
            kind,
            f"{TASK}{WITH_PAST}" if TASK in member.tasks else member.task(config.get("architectures")),
            member.loader,
            as_stored,
        )


def _check_repo_id(repo_id: str | None) -> None:
    try:
        if repo_id is not None:
            validate_repo_id(repo_id)
    except HFValidationError:
        raise Lfm2Error(f"--repo-id {repo_id} is no id on the Hub. Give one such as YOU/YOUR-MODEL.") from None

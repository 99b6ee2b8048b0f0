"""A checkpoint at the door. It is read once, checked, and handed along as a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from optimum.utils import logging
from transformers import GenerationConfig, PretrainedConfig

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import CLAIMED, member_of
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.companions import generation_settings
from optimum_lfm2.loading.config_check import loaded_config
from optimum_lfm2.loading.modules import find_modules
from optimum_lfm2.loading.processor import Processor, find_processor
from optimum_lfm2.loading.supported import check_architecture
from optimum_lfm2.weights.checkpoint import find_tensors


HUB = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")

logger = logging.get_logger(__name__)


def is_ours(model_name_or_path: str | Path, **kwargs: Any) -> bool:
    """Return whether the `config.json` of a model names a type of ours. Return False if it cannot be read.

    Args:
        model_name_or_path: a folder, or an id on the Hub.
        kwargs: arguments of `from_pretrained`. Those that say where the file is are used.
    """
    where = {name: value for name, value in _hub(kwargs).items() if name != "force_download"}
    try:
        config, _ = PretrainedConfig.get_config_dict(model_name_or_path, **where)
    except Exception:  # whatever loads the model says what is wrong with it
        return False
    return config.get("model_type") in CLAIMED


@dataclass(frozen=True)
class Source:
    """A checkpoint of ours.

    Attributes:
        name: its folder, or its id on the Hub.
        hub: arguments of `transformers.utils.cached_file`, such as `revision`.
        config: its configuration, as transformers loads it and as both releases read it.
        member: the record of its member.
        trusted: whether the checkpoint brings code that the user trusts.
    """

    name: str
    hub: Mapping[str, Any]
    config: PretrainedConfig
    member: Member
    trusted: bool = False

    @classmethod
    def open(
        cls,
        model_name_or_path: str | Path,
        tell: Callable[[str], None] = logger.info,
        trust_remote_code: bool | None = False,
        **kwargs: Any,
    ) -> Source:
        """Read and check the configuration of a checkpoint of ours.

        Args:
            model_name_or_path: its folder, or its id on the Hub.
            tell: gets a sentence on whatever is read otherwise than transformers reads it.
            trust_remote_code: whether the user trusts the checkpoint's code.
            kwargs: arguments of `from_pretrained`. Those that say where the files are are used.

        Raises:
            Lfm2Error: the checkpoint cannot be exported.
        """
        hub = _hub(kwargs)
        # This checks the file's own fields. transformers replaces some wrong ones by defaults, and fails on others.
        check_architecture(PretrainedConfig.get_config_dict(model_name_or_path, **hub)[0])
        config = loaded_config(model_name_or_path, tell, **hub)
        compat.spell_rope_for_both(config.get_text_config())
        member = member_of(config)
        return cls(str(model_name_or_path), hub, config, member, member.runs_own_code and bool(trust_remote_code))

    @property
    def task(self) -> str:
        """The task of the checkpoint's class, without past. One saved without a head has `feature-extraction`."""
        return self.member.task(self.config.architectures)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each stored tensor, by name. Reading it raises `Lfm2Error` for files that are broken."""
        return find_tensors(self.name, **self.hub)

    @cached_property
    def modules(self) -> dict[str, Path]:
        """The files of sentence-transformers, by name (`find_modules`)."""
        return find_modules(self.name, **self.hub)

    @cached_property
    def processor(self) -> Processor | None:
        """The processor of a model that takes pictures. Reading it raises `Lfm2Error` for one that does not fit."""
        tower = self.member.tower
        return None if tower is None else find_processor(self.name, self.config, tower.processor, **self.hub)

    @property
    def generation_config(self) -> GenerationConfig:
        """The settings of its `generation_config.json`, or else those of its configuration."""
        written = generation_settings(self.name, **self.hub)
        return GenerationConfig.from_model_config(self.config) if written is None else written


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise `Lfm2Error` for bfloat16, for which the graph's operators have no kernels (onnxruntime 1.32, CPU)."""
    if dtype == torch.bfloat16:
        raise Lfm2Error(
            "bf16: onnxruntime has no bfloat16 kernels for these operators on the CPU. "
            "Use fp32, or fp16 for a file of the same size."
        )


def _hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}

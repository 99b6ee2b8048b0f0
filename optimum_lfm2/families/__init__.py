"""The members of the family. Each has one file with one record. A new member is added to `MEMBERS` here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from optimum_lfm2.families import encoder, granite, lfm2, lfm2_moe, lfm2_vl, lfm3, lfm3_vl, olmo_hybrid
from optimum_lfm2.graph.member import Member


# Where several members have one model type, the first of them gets the checkpoints that no other member claims.
MEMBERS: tuple[Member, ...] = (
    lfm2.MEMBER,
    encoder.MEMBER,
    lfm2_moe.MEMBER,
    lfm3.MEMBER,
    lfm2_vl.MEMBER,
    lfm3_vl.MEMBER,
    granite.MEMBER,
    olmo_hybrid.MEMBER,
)
MODEL_TYPES = tuple(dict.fromkeys(name for record in MEMBERS for name in record.model_types))
# Those that Optimum's own commands and classes export and load with this package (`registration.py`).
CLAIMED = list(MODEL_TYPES)


def member_of(config: PretrainedConfig | Mapping[str, Any]) -> Member:
    """Return the record of the member that a model belongs to.

    Args:
        config: the model's configuration, or the contents of its `config.json`.

    Raises:
        KeyError: the model type is none of `MODEL_TYPES`.
    """
    model_type, names = (
        config.get(field) if isinstance(config, Mapping) else getattr(config, field, None)
        for field in ("model_type", "architectures")
    )
    members = [record for record in MEMBERS if model_type in record.model_types]
    if not members:
        raise KeyError(model_type)
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return next((record for record in members if any(map(record.spelled, named))), members[0])

"""The members of the family. Each has one file with one record. A new member is added to `MEMBERS` here."""

from __future__ import annotations

from optimum_lfm2.families import lfm2, lfm2_moe, lfm3
from optimum_lfm2.graph.member import Member


MEMBERS: dict[str, Member] = {record.model_type: record for record in (lfm2.MEMBER, lfm2_moe.MEMBER, lfm3.MEMBER)}
MODEL_TYPES = tuple(MEMBERS)

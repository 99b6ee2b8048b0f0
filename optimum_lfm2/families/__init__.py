"""The members of the family. Each has one file with one record. A new member is added to `MEMBERS` here."""

from __future__ import annotations

from optimum_lfm2.families import lfm2, lfm2_moe, lfm3, vision
from optimum_lfm2.graph.member import Member


RECORDS = (lfm2.MEMBER, lfm2_moe.MEMBER, lfm3.MEMBER, vision.MEMBER)
MEMBERS: dict[str, Member] = {
    name: record for record in RECORDS for name in (record.model_type, *record.other_spellings)
}
MODEL_TYPES = tuple(MEMBERS)

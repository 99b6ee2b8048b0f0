"""What belongs beside the graphs of every exported folder, whoever writes it."""

from __future__ import annotations

from pathlib import Path

from optimum_lfm2 import compat
from optimum_lfm2.graph.member import Member
from optimum_lfm2.loading.modules import copy_modules
from optimum_lfm2.loading.source import Source
from optimum_lfm2.sidecars.response_template import write_response_template


def write_sidecars(folder: Path, source: Source | None, member: Member, task: str) -> None:
    """Write the processor and the modules of a checkpoint, and spell all files as every runtime reads them.

    The folder has `config.json` and the tokenizer's files already. `write_genai_config` and `declare_external_data`
    write what depends on the graphs.

    Args:
        folder: the folder of `config.json`.
        source: the checkpoint. None for a model in memory, which has no files.
        member: the record of the model, which says how other runtimes read `config.json`.
        task: the task of the export, without past. sentence-transformers opens a folder only without a head that
            predicts tokens, so its files are copied only then.
    """
    if source is not None and source.processor is not None:
        source.processor.write(folder)
    if source is not None and task != "text-generation":
        copy_modules(source.modules, folder)
    compat.spell_tokenizer_for_both(folder)
    compat.repeat_chat_template(folder)
    write_response_template(folder)
    compat.spell_model_type(folder, member.model_type)
    compat.spell_config(folder, member.written)

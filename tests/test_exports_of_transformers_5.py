"""Either release of transformers runs exports of members that only transformers 5 has. `make_exports.py` made them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from make_exports import EXPORTS, MEMBERS, PICTURES
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from pictures import TRAINED

from optimum_lfm2 import ORTLfm2ForCausalLM, ORTLfm3VlForConditionalGeneration, compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.serving.folder import load_folder


@pytest.mark.parametrize("model_type", MEMBERS)
def test_an_export_gives_transformers_tokens(model_type):
    """Alone, and beside a shorter row, in chunks, after padding that is as long as a window."""
    model = ORTModelForCausalLM.from_pretrained(EXPORTS / model_type)
    assert isinstance(model, ORTLfm2ForCausalLM)
    assert model.config.model_type == model_type
    gold = json.loads((EXPORTS / model_type / "gold.json").read_text())
    row, new = torch.tensor(gold["prompt"]), len(gold["tokens"])
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(row[None], **options)[0, len(row) :].tolist() == gold["tokens"]
    ids, mask = torch.full((2, len(row) + 9), 9), torch.zeros(2, len(row) + 9, dtype=torch.int64)
    ids[0, 9:], mask[0, 9:] = row, 1
    mask[1, -3:] = 1
    out = model.generate(ids, attention_mask=mask, prefill_chunk_size=5, **options)
    assert out[0, ids.shape[1] :].tolist() == gold["tokens"]


def test_an_export_with_pictures_and_a_video_gives_transformers_tokens(tmp_path):
    """Alone, and beside a row of text, in chunks. And once more from what the model saves."""
    model = ORTLfm3VlForConditionalGeneration.from_pretrained(EXPORTS / PICTURES)
    given = torch.load(EXPORTS / PICTURES / "pictures.pt")
    gold = json.loads((EXPORTS / PICTURES / "gold.json").read_text())
    row, new = torch.tensor(gold["prompt"]), len(gold["tokens"])
    options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(row[None], **options, **given)[0, len(row) :].tolist() == gold["tokens"]
    ids, mask = torch.full((2, len(row) + 9), 9), torch.zeros(2, len(row) + 9, dtype=torch.int64)
    ids[0, 9:], mask[0, 9:] = row, 1
    mask[1, -3:] = 1
    out = model.generate(ids, attention_mask=mask, prefill_chunk_size=5, **options, **given)
    assert out[0, ids.shape[1] :].tolist() == gold["tokens"]
    model.save_pretrained(tmp_path)
    again = ORTLfm3VlForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.model_type == PICTURES
    assert again.generate(row[None], **options, **given)[0, len(row) :].tolist() == gold["tokens"]


@pytest.mark.skipif(PICTURES not in compat.STAND_INS, reason="this transformers has its processor")
def test_without_its_processor_nobody_chats_with_it(tmp_path):
    folder = shutil.copytree(EXPORTS / PICTURES, tmp_path / "export")
    shutil.copy(TRAINED / "tokenizer.json", folder)
    with pytest.raises(Lfm2Error, match=r"The processor of lfm3_vl is in transformers 5\.23"):
        load_folder(folder)


@pytest.mark.parametrize("model_type", [name for name in (*MEMBERS, PICTURES) if name in compat.STAND_INS])
def test_a_release_without_the_model_exports_none(model_type, tmp_path):
    folder = shutil.copytree(EXPORTS / model_type, tmp_path / "export", ignore=shutil.ignore_patterns("*.onnx*"))
    load = ORTLfm3VlForConditionalGeneration if model_type == PICTURES else ORTModelForCausalLM
    with pytest.raises(Lfm2Error, match="Install transformers 5"):
        load.from_pretrained(folder, export=True)
    with pytest.raises(Lfm2Error, match="Install transformers 5"):
        main_export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()

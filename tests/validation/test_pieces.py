"""Files that onnxruntime does not load or run, and outputs of another shape than transformers'."""

from __future__ import annotations

import pytest
import torch

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.validation.pieces import open_session, outputs_of


@pytest.mark.parametrize("content", [b"", b"no graph"])
def test_a_file_that_does_not_load(content, tmp_path):
    (tmp_path / "model.onnx").write_bytes(content)
    for model in (tmp_path / "model.onnx", content):
        with pytest.raises(Lfm2Error, match="does not load") as error:
            open_session(model, tmp_path)
        assert "\n" not in str(error.value)


def test_outputs_of_a_session(exported):
    folder = exported("hybrid", task="text-generation")
    session = open_session(folder / "model.onnx", folder)
    feeds = {"input_ids": torch.tensor([[9, 8]]).numpy(), "attention_mask": torch.ones(1, 2).long().numpy()}
    (logits,) = outputs_of(session, feeds, {"logits": torch.zeros(2, 256)}).values()
    assert logits.shape == (2, 256)
    assert logits.dtype == torch.float32
    with pytest.raises(Lfm2Error, match=r"logits has the shape \(1, 2, 256\), not \(1, 3, 256\)"):
        outputs_of(session, feeds, {"logits": torch.zeros(1, 3, 256)})
    del feeds["attention_mask"]
    with pytest.raises(Lfm2Error, match="does not run") as error:
        outputs_of(session, feeds, {"logits": torch.zeros(1, 2, 256)})
    assert "\n" not in str(error.value)

"""What a model with pictures refuses before anything runs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import Lfm2VlConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.graph.siglip2 import TOWER
from optimum_lfm2.runtime.vision_checks import check_folder, check_shown, check_type


CONFIG = Lfm2VlConfig(vision_config={"num_channels": 3, "patch_size": 2})
CLASS = "ORTLfm2VlForConditionalGeneration"


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("llama", "of the type llama, which ORTLfm2VlForConditionalGeneration does not load"),
        ("lfm2", "text alone"),
        (None, "of the type None"),
    ],
)
def test_types(model_type, says):
    with pytest.raises(Lfm2Error, match=says):
        check_type(model_type, CLASS, "folder")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "of the type llama"),
        ({"downsample_factor": "two"}, "downsample_factor"),
        ({"text_config": {"hidden_size": -1}}, "hidden_size"),
    ],
    ids=str,
)
def test_folders(change, says, vl_checkpoint, tmp_path):
    folder = shutil.copytree(vl_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    nested = {name: {**config[name], **value} if isinstance(value, dict) else value for name, value in change.items()}
    check_folder(folder, CLASS)
    (folder / "config.json").write_text(json.dumps(config | nested))
    with pytest.raises(Lfm2Error, match=says):
        check_folder(folder, CLASS)
    with pytest.raises(Lfm2Error, match="has no config"):
        check_folder(tmp_path, CLASS)


def pictures(tiles: int = 2, patches: int = 6, width: int = 12, shapes: tuple = ((2, 3), (1, 1))) -> tuple:
    return torch.zeros(tiles, patches, width), torch.tensor(shapes), torch.ones(tiles, patches, dtype=torch.int32)


def check(pixels: object, shapes: object, mask: object) -> dict[str, torch.Tensor]:
    (medium,) = TOWER.media
    return check_shown(medium, (pixels, mask, shapes), TOWER, CONFIG)


def test_pictures_that_fit():
    assert list(check(*pictures())) == list(TOWER.inputs(CONFIG))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((*pictures()[:2], None), "pixel_attention_mask is missing"),
        (pictures(width=11), "do not fit"),
        ((pictures()[0][0], *pictures()[1:]), "do not fit"),
        ((*pictures()[:2], pictures(patches=7)[2]), "do not fit"),
        ((*pictures()[:2], pictures(tiles=1)[2]), "do not fit"),
        (pictures(shapes=((2, 3),)), "do not fit"),
        (pictures(shapes=((2, 3, 1), (1, 1, 1))), "do not fit"),
        ((pictures()[0].to(torch.uint8), *pictures()[1:]), "has to be float"),
        (pictures(shapes=((2, 3), (7, 1))), "more patches than pixel_values has"),
        (pictures(shapes=((2, 3), (0, 1))), "or none"),
        (pictures(shapes=((2, 3), (-1, -1))), "or none"),
    ],
)
def test_pictures_that_do_not_fit(values, says):
    with pytest.raises(Lfm2Error, match=says) as error:
        check(*values)
    assert "\n" not in str(error.value)

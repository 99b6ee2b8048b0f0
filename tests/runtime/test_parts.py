"""Which files a model in parts is loaded from."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.runtime.parts import DECODER, EMBEDDING, VISION, part_files


def files(*suffixes: str) -> list[Path]:
    return [Path("onnx", f"{part}{suffix}") for suffix in suffixes for part in (DECODER, EMBEDDING, VISION)]


@pytest.mark.parametrize(
    ("suffixes", "file_name", "chosen"),
    [
        ([".onnx", "_q4.onnx"], None, ".onnx"),
        ([".onnx", "_q4.onnx"], f"{DECODER}_q4.onnx", "_q4.onnx"),
        (["_q4.onnx"], None, "_q4.onnx"),
    ],
)
def test_all_parts_have_one_precision(suffixes, file_name, chosen):
    expected = {part: Path("onnx", f"{part}{chosen}") for part in (DECODER, EMBEDDING, VISION)}
    assert part_files(files(*suffixes), file_name, "folder") == expected


@pytest.mark.parametrize(
    ("found", "file_name", "says"),
    [
        (files(".onnx")[1:], None, f"folder has no {DECODER}.onnx"),
        (
            files("_q8.onnx", "_q4.onnx"),
            None,
            rf'{DECODER}_q4.onnx, {DECODER}_q8.onnx. .*file_name="{DECODER}_q4.onnx"',
        ),
        (files(".onnx"), f"{VISION}.onnx", "give the file of the decoder"),
        (files(".onnx"), f"{DECODER}_q4.onnx", f"no {DECODER}_q4.onnx and no {EMBEDDING}_q4.onnx and no {VISION}_q4"),
        (files(".onnx")[:1], None, f"no {EMBEDDING}.onnx and no {VISION}.onnx"),
    ],
)
def test_files_that_are_not_there_or_not_told_apart(found, file_name, says):
    with pytest.raises(Lfm2Error, match=says) as error:
        part_files(found, file_name, "folder")
    assert "\n" not in str(error.value)

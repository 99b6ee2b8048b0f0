"""The text that transformers' processor makes of chats with several pictures and with none.

transformers 4.57 does it wrongly, and `compat.mend_pictures_in_text` mends it. The expected text is the template's. In
the place of each picture it has a token for each square of `downsample_factor` patches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision_python


pytestmark = pytest.mark.skipif(
    not torchvision_python.is_installed(), reason="no torchvision: `make test` installs one for the tests"
)
SUPPORT = Path(__file__).parent / "support"


def test_every_chat_keeps_its_text_and_its_pictures(checkpoint):
    command = [sys.executable, SUPPORT / "torchvision_python.py", SUPPORT / "chats_child.py"]
    done = subprocess.run([*command, checkpoint("trained_vision")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    chats = json.loads(done.stdout.splitlines()[-1])
    assert len(chats) == 14
    for name, (said, expected, left) in chats.items():
        assert said == expected, name
        assert left == 0, name

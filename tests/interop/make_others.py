"""Make folders with onnxruntime-genai's own builder from the demo checkpoint, for the tests of other exporters' graphs.

    python tests/interop/make_others.py FOLDER

This writes FOLDER/genai_fp32 and FOLDER/genai_int4. The builder needs transformers 5, in an environment of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
PRECISIONS = ("fp32", "int4")


def main(folder: Path) -> None:
    for precision in PRECISIONS:
        output, cache = folder / f"genai_{precision}", folder / "cache"
        options = ["-i", str(CHECKPOINT), "-o", str(output), "-p", precision, "-e", "cpu", "-c", str(cache)]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *options], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

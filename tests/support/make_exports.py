"""Export tiny models that transformers 4 lacks, so that its tests can run the exports.

`python tests/support/make_exports.py` writes tests/exports/NAME for each member: the export, and `gold.json` with a
prompt and transformers' greedy tokens after it. It needs transformers 5.23, and must run again after a change of the
exported graph or of its caches.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from checkpoints import ATTENTION, CONV, DELTA, SLIDING, gold_tokens, make_checkpoint, prompts


EXPORTS = Path(__file__).parents[1] / "exports"
NEW = 24
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
TINY |= {"num_key_value_heads": 1}
MEMBERS = {
    "lfm2_moe": ("moe", TINY | {"layer_types": [CONV, ATTENTION, CONV], "num_experts": 4}),
    "lfm3": ("lfm3", TINY | {"layer_types": [CONV, SLIDING, ATTENTION]}),
    "olmo_hybrid": ("olmo", TINY | {"layer_types": [DELTA, ATTENTION, DELTA]}),
}


PICTURES = "lfm3_vl"  # and `pictures.pt`, what a prompt of it shows


def make_pictures(folder: Path) -> None:
    """Write the export of a tiny LFM3-VL."""
    import torch
    from lfm3_pictures import VISION, as_videos, gold_lfm3_vl, make_lfm3_vl, row, shown
    from optimum.exporters.onnx import main_export
    from pictures import gold_vl_tokens

    shutil.rmtree(folder, ignore_errors=True)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower |= {"num_key_value_heads": 1}
    # Full attention comes first, as in the published model: Transformers.js reads the length from the first layer.
    text = TINY | {"layer_types": [CONV, ATTENTION, SLIDING]}
    with tempfile.TemporaryDirectory() as work:
        checkpoint = make_lfm3_vl(
            Path(work) / "checkpoint", text_config=text, vision_config=VISION | tower, projector_hidden_size=32
        )
        main_export(str(checkpoint), folder)
        gold = gold_lfm3_vl(checkpoint)
        prompt = row("", [])[:3]
        pictures, film = [(1, 4, 6), (1, 2, 2)], [(2, 2, 4)]
        places = torch.tensor([4] * 6 + [9, 4, 11] + [5] * 4 + [12, 13])
        prompt = torch.cat([prompt.clamp(max=95), places])
        given = shown(pictures, gold.config) | as_videos(shown(film, gold.config, 2))
        tokens = gold_vl_tokens(gold, prompt, given, NEW)
        still = prompt[:-6]  # of the pictures alone
        alone = gold_vl_tokens(gold, still, {name: given[name] for name in ("pixel_values", "image_grid_thw")}, NEW)
    for path in folder.glob("*token*"):
        path.unlink()  # a vocabulary of this size has none
    torch.save(given, folder / "pictures.pt")
    golds = {"prompt": prompt.tolist(), "tokens": tokens, "of pictures": [still.tolist(), alone]}
    (folder / "gold.json").write_text(json.dumps(golds) + "\n")


def main() -> None:
    # This import comes before Optimum's: transformers 5 needs it so.
    import optimum_lfm2  # noqa: F401

    # isort: split
    from optimum.exporters.onnx import main_export
    from transformers import AutoModelForCausalLM

    make_pictures(EXPORTS / PICTURES)
    for model_type, (name, options) in MEMBERS.items():
        folder = EXPORTS / model_type
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as work:
            checkpoint = make_checkpoint(name, Path(work), **options)
            main_export(str(checkpoint), folder)
            (row,) = prompts([19], vocab_size=options["vocab_size"])
            gold = gold_tokens(AutoModelForCausalLM.from_pretrained(checkpoint).eval(), row, NEW)
        (folder / "gold.json").write_text(json.dumps({"prompt": row.tolist(), "tokens": gold}) + "\n")


if __name__ == "__main__":
    main()

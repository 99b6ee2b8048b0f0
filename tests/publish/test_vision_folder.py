"""`export lfm2` of LFM2-VL: the folder, its card, a second run, and what the other commands make of it."""

from __future__ import annotations

import json
import re
import shutil

import onnx_ir as ir
import pytest
import torch
from huggingface_hub import ModelCard
from pictures import asked, drawn, gold_vl_model, gold_vl_tokens, processed, write_png
from publishing import DEMO, js_config, rows, run, tree
from transformers import AutoProcessor, AutoTokenizer

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, vision_configs
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.publish.precisions import DEFAULT, PARTS, PRECISIONS
from optimum_lfm2.quality.evaluate import evaluate


NEW = 24
QUESTION = "What is in this picture?"
NAMES = [PRECISIONS[precision].named(part) for precision in DEFAULT for part in PARTS]
GENAI = ["genai_decoder.onnx_graph", "genai_embedding.onnx_graph"]


@pytest.fixture(scope="module")
def inputs(vl_checkpoint):
    pixels = drawn()
    ids = asked(QUESTION, [pixels], AutoTokenizer.from_pretrained(vl_checkpoint))
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **processed(pixels)}


@pytest.fixture(scope="module")
def gold(vl_checkpoint, inputs):
    return gold_vl_tokens(gold_vl_model(vl_checkpoint), inputs["input_ids"][0], processed(drawn()), NEW)


def tokens(model, inputs) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_files(vl_hub_folder):
    written = set(tree(vl_hub_folder)) - {"special_tokens_map.json"}  # only transformers 4 writes it
    expected = {f"onnx/{name}{part}" for name in NAMES for part in ("", "_data")} | {f"onnx/{name}" for name in GENAI}
    expected |= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
    }
    expected |= {"genai_config.json", "genai_processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert written == expected
    assert js_config(vl_hub_folder) == {"use_external_data_format": dict.fromkeys(NAMES, True)}
    assert json.loads((vl_hub_folder / "config.json").read_text())["model_type"] == "lfm2_vl"


@pytest.mark.parametrize("precision", DEFAULT)
def test_a_browser_can_run_them_and_a_vision_encoder_never_has_4_bits(precision, vl_hub_folder):
    for part in PARTS:
        graph = ir.load(vl_hub_folder / "onnx" / PRECISIONS[precision].named(part)).graph
        assert "GatherBlockQuantized" not in {node.op_type for node in graph}
        assert "num_logits_to_keep" not in graph.initializers
        bits = {node.attributes.get_int("bits") for node in graph if node.op_type == "MatMulNBits"}
        if part == "vision_encoder":
            assert bits == ({8} if precision.startswith("q") else set())
        embeds = [
            value.dtype for value in (*graph.inputs, *graph.outputs) if value.name.endswith(("embeds", "features"))
        ]
        assert set(embeds) == {ir.DataType.FLOAT}


@pytest.mark.parametrize("precision", DEFAULT)
def test_every_precision_answers(precision, vl_hub_folder, inputs, gold):
    """The decoder is trained, and sure of its words: rounding to 8 or 16 bits changes none of them here."""
    file = PRECISIONS[precision].named("decoder_model_merged")
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_hub_folder, subfolder="onnx", file_name=file)
    assert str(model.path).endswith(file)
    same = 8 if precision.startswith("q4") else NEW
    assert tokens(model, inputs)[:same] == gold[:same]


def test_the_default_is_fp32_or_the_only_one(vl_hub_folder, inputs, gold, tmp_path):
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(vl_hub_folder)
    assert str(model.path).endswith("decoder_model_merged.onnx")
    assert tokens(model, inputs) == gold
    some = shutil.copytree(vl_hub_folder, tmp_path / "some", ignore=shutil.ignore_patterns("*merged.onnx*"))
    with pytest.raises(Lfm2Error, match=r"decoder_model_merged_q4\.onnx.* Choose one"):
        ORTLfm2VlForConditionalGeneration.from_pretrained(some)
    for path in some.glob("onnx/*"):
        if "_q4." not in path.name:
            path.unlink()
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(some)
    assert str(model.path).endswith("decoder_model_merged_q4.onnx")


@pytest.mark.once
def test_a_second_run_adds_and_leaves_the_others(vl_hub_folder, vl_checkpoint, tmp_path):
    unwanted = shutil.ignore_patterns("*16.onnx*", "*quantized.onnx*", "vision_encoder_q4.onnx*")
    out = shutil.copytree(vl_hub_folder, tmp_path / "work" / "out", ignore=unwanted)
    source = shutil.copytree(vl_checkpoint, tmp_path / "source")
    (source / "LICENSE").write_text("as it is")
    before = tree(out)
    assert run("--model", source, out, "--precisions", "q8", "--repo-id", "me/vl-onnx") == 0
    after = tree(out)
    written = {f"onnx/{PRECISIONS['q8'].named(part)}{data}" for part in PARTS for data in ("", "_data")}
    written |= {"README.md", "LICENSE", "config.json", "genai_config.json", *(f"onnx/{name}" for name in GENAI)}
    assert {name for name in after if before.get(name) != after[name]} == written
    cells = rows(out)
    assert list(cells) == ["fp32", "q8"]  # q4 lacks a part
    assert cells["fp32"] == rows(vl_hub_folder)["fp32"]
    declared = {PRECISIONS[name].named(part): True for name in ("fp32", "q8") for part in PARTS}
    assert js_config(out)["use_external_data_format"] == declared
    genai = json.loads((out / "genai_config.json").read_text())["model"]
    assert genai["vision"]["filename"] == "onnx/vision_encoder_quantized.onnx"
    card = (out / "README.md").read_text()
    assert 'from_pretrained("me/vl-onnx", file_name="decoder_model_merged_quantized.onnx")' in card
    assert "these have 8" not in card
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.once
def test_of_a_precision_that_fails_no_file_is_left(vl_checkpoint, tmp_path, monkeypatch, capfd):
    def wrong(config, model, path, atol):
        if "q4" in path.name:
            raise Lfm2Error("The file is wrong.")
        return {"image_features": 0.0}

    monkeypatch.setattr(vision_configs, "validate_vision", wrong)
    assert run("--model", vl_checkpoint, tmp_path / "out", "--precisions", "q4", "q8") == 1
    assert capfd.readouterr().err == "optimum-cli: error: q4: The file is wrong.\n"
    left = {path.name for path in tmp_path.glob("out/onnx/*") if not path.name.endswith("_data")}
    assert left == {*GENAI, *(PRECISIONS["q8"].named(part) for part in PARTS)}


def test_the_card_says_what_was_measured(vl_hub_folder, vl_checkpoint):
    card = ModelCard.load(vl_hub_folder / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers.js")
    assert {"lfm2_vl", "onnx", "onnxruntime-genai"} <= set(card.data.tags)
    cells = rows(vl_hub_folder)
    assert list(cells) == list(DEFAULT)
    assert [row[5] for row in cells.values()] == [PRECISIONS[precision].vision for precision in DEFAULT]
    for column in (4, 6):  # decoder, vision encoder
        assert 0 < float(cells["fp32"][column]) < 1e-5 < float(cells["fp16"][column]) < 0.02
    quality = evaluate(
        vl_hub_folder / "onnx" / "decoder_model_merged_q4.onnx",
        vl_checkpoint,
        DEMO / "heldout.txt",
        chunks=2,
        length=128,
    )
    assert cells["q4"][-3] == f"{quality.perplexity:.4f}"
    assert 1e-5 < quality.kl_divergence < 0.1
    assert "these have 8: `vision_encoder_q4.onnx`, `embed_tokens_q4.onnx`, `vision_enc" in card.text


@pytest.mark.parametrize("index", range(3), ids=["optimum", "genai", "onnxruntime"])
def test_the_snippets_answer(index, vl_hub_folder, inputs, tmp_path, monkeypatch, capsys):
    """Transformers' own processor needs torchvision, so that here another stands in its place."""
    snippets = re.findall(r"```python\n(.*?)```", (vl_hub_folder / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 3
    if "onnxruntime_genai" in snippets[index]:
        pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    (tmp_path / vl_hub_folder.name).symlink_to(vl_hub_folder)
    write_png(tmp_path / "picture.jpg", drawn())  # its content says what it is
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(vl_hub_folder)

    class Processor:
        decode = tokenizer.decode

        def apply_chat_template(self, chat, return_tensors, **_):
            assert chat[0]["content"][1]["text"] == QUESTION
            return inputs if return_tensors == "pt" else {name: x.numpy() for name, x in inputs.items()}

    processor = Processor()
    processor.tokenizer = tokenizer
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    exec(compile(snippets[index], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == answer(vl_hub_folder, inputs)


def answer(folder, inputs) -> str:
    """Return the text that our model gives in q4, the precision of the card's examples."""
    model = ORTLfm2VlForConditionalGeneration.from_pretrained(folder, file_name="decoder_model_merged_q4.onnx")
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 8 < len(out) < 64
    return AutoTokenizer.from_pretrained(folder).decode(out, skip_special_tokens=True)


@pytest.mark.once
def test_other_commands_run_or_refuse_in_one_line(vl_hub_folder, vl_folder, vl_checkpoint, tmp_path, cli):
    """`evaluate` measures the decoder, on text alone."""
    text = ["--text", DEMO / "heldout.txt", "--chunks", 4, "--length", 64]
    assert cli("lfm2", "evaluate", vl_folder, "--reference", vl_checkpoint, *text, "--max-kld", 1e-6) == (0, "")
    lonely = tmp_path / "onnx"
    lonely.mkdir()
    shutil.copy(vl_folder / "onnx" / "decoder_model_merged.onnx", lonely)
    shutil.copy(vl_folder / "onnx" / "decoder_model_merged.onnx_data", lonely)
    copied = shutil.copytree(vl_checkpoint, tmp_path / "checkpoint")
    for command, said in [
        (["lfm2", "evaluate", vl_hub_folder, "--reference", vl_checkpoint, *text], "several models"),
        (["lfm2", "evaluate", lonely, "--reference", vl_checkpoint, *text], "has no embed_tokens beside it"),
        (["lfm2", "quantize-cache", vl_folder, *text], "takes pictures too"),
        (["export", "lfm2", "--model", vl_checkpoint, vl_folder], "no file of optimum-cli export lfm2"),
        (["export", "lfm2", "--model", copied, copied], "holds a checkpoint"),
    ]:
        code, err = cli(*command)
        assert (code, err.count("\n")) == (1, 1)
        assert said in err

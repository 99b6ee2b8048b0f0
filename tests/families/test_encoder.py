"""Encoders: an export computes for every row what the reference computes for the row alone, under any padding."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import ENCODERS, encoder_gold, encoder_task, make_encoder, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import (
    ORTModelForCausalLM,
    ORTModelForFeatureExtraction,
    ORTModelForMaskedLM,
    ORTModelForSequenceClassification,
    ORTModelForTokenClassification,
)
from transformers import AutoConfig

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.loading.source import Source
from optimum_lfm2.validation import run_trusted, trusted
from optimum_lfm2.validation.decoder import errors_as_they_are


CLASSES = {
    "feature-extraction": ORTModelForFeatureExtraction,
    "fill-mask": ORTModelForMaskedLM,
    "token-classification": ORTModelForTokenClassification,
    "text-classification": ORTModelForSequenceClassification,
}
CODE = Path(__file__).with_name("bidirectional_code.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(name)` gives the folder of an encoder of the table. Never write to it."""
    folder = tmp_path_factory.mktemp("encoders")
    return cache(lambda name: make_encoder(name, folder))


@pytest.fixture(scope="module")
def export(made, tmp_path_factory):
    """`export(name, **options)` gives the folder of a validated export. Never write to it."""

    @cache
    def export(name, **options):
        folder = tmp_path_factory.mktemp("export")
        with errors_as_they_are():
            main_export(str(made(name)), folder, **options)
        return folder

    return export


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows with random ids in place of padding: on the right, on the left, and on both sides."""
    width = max(map(len, rows)) + 3
    ids = torch.randint(8, 256, (len(rows), width), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        first = (0, width - len(row), 2)[index % 3]
        ids[index, first : first + len(row)] = row
        mask[index, first : first + len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def first_output(output) -> torch.Tensor:
    return output[0].detach().float()


@torch.no_grad()
def compared(model, gold, rows) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a model gives to padded rows together, without the padding, and what the gold gives to each row alone."""
    batch = padded(rows)
    outputs = first_output(model(**batch))
    visible = batch["attention_mask"].bool()
    own = [output[seen] if outputs.dim() == 3 else output for output, seen in zip(outputs, visible, strict=True)]
    return own, [first_output(gold(row[None]))[0] for row in rows]


ROWS = prompts([11, 6, 14, 1])


@pytest.mark.parametrize("name", ENCODERS)
def test_padded_rows_are_the_rows_alone(name, made, export):
    task = encoder_task(name)
    model = CLASSES[task].from_pretrained(export(name))
    own, gold = compared(model, encoder_gold(made(name), task), ROWS)
    for values, expected in zip(own, gold, strict=True):
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    firsts = torch.stack([values[0] if values.dim() > 1 else values for values in gold])
    assert torch.pdist(firsts).min() > 0.1, "a gold that is the same for every row proves nothing"
    alone = first_output(model(input_ids=ROWS[0][None], attention_mask=torch.ones_like(ROWS[0][None])))
    torch.testing.assert_close(alone[0], gold[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "least"),
    [({"dtype": "fp16"}, 0.9999), ({"variant": "q8"}, 0.98)],
    ids=["fp16", "q8"],
)
@pytest.mark.parametrize("name", ["encoder", "sequence_classifier"])
def test_other_precisions_are_validated_and_near(name, options, least, made, export):
    task = encoder_task(name)
    model = CLASSES[task].from_pretrained(export(name, **options))
    own, gold = compared(model, encoder_gold(made(name), task), ROWS)
    cosines = [torch.cosine_similarity(a, b, dim=-1).min() for a, b in zip(own, gold, strict=True)]
    assert min(cosines) > least


def test_what_the_folder_says(export, made):
    config = json.loads((export("encoder") / "config.json").read_text())
    assert config["architectures"] == ["Lfm2BidirectionalModel"]
    assert not {"auto_map", "export_model_type"} & config.keys()
    assert member_of(AutoConfig.from_pretrained(export("encoder"))).encodes
    assert not (export("encoder") / "genai_config.json").exists()
    labels = json.loads((export("token_classifier") / "config.json").read_text())
    assert len(labels["id2label"]) == 5


def test_the_trunk_of_a_masked_language_model(made, export):
    model = ORTModelForFeatureExtraction.from_pretrained(export("masked_lm", task="feature-extraction"))
    own, gold = compared(model, encoder_gold(made("masked_lm"), "fill-mask").lfm2, ROWS)
    for values, expected in zip(own, gold, strict=True):
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)


def test_a_class_of_optimum_exports_while_it_loads(made):
    model = ORTModelForMaskedLM.from_pretrained(made("masked_lm"), export=True)
    own, gold = compared(model, encoder_gold(made("masked_lm"), "fill-mask"), ROWS[:1])
    torch.testing.assert_close(own[0], gold[0], atol=1e-4, rtol=0)


def test_trusted_code_is_compared_and_a_difference_is_told(made, tmp_path, monkeypatch):
    """It runs in a process of its own: transformers' classes are as they were."""
    source = shutil.copytree(made("encoder_conv_width_5_and_bias"), tmp_path / "source")
    shutil.copyfile(CODE, source / "modeling_lfm2_bidirectional.py")
    original, given = trusted.trusted_outputs, []

    def outputs(*arguments):
        given.extend(original(*arguments))
        return given

    monkeypatch.setattr(trusted, "trusted_outputs", outputs)
    with errors_as_they_are():
        main_export(str(source), tmp_path / "out", trust_remote_code=True)
    assert len(given) == 2
    monkeypatch.setattr(trusted, "trusted_outputs", lambda *_: [1.01 * values for values in given])
    with pytest.raises(Lfm2Error, match="differs from its own code"), errors_as_they_are():
        main_export(str(source), tmp_path / "wrong", trust_remote_code=True)
    monkeypatch.setattr(trusted, "trusted_outputs", lambda *_: [values[:, 1:] for values in given])
    with pytest.raises(Lfm2Error, match=r"output has the shape .* code of .* has"), errors_as_they_are():
        main_export(str(source), tmp_path / "wrong", trust_remote_code=True)


@pytest.mark.parametrize(("said", "says"), [("Traceback\nKeyError: 1\n", "KeyError: 1"), ("", "it says nothing")])
def test_trusted_code_that_fails(said, says, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(trusted.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(Lfm2Error, match=f"code of {tmp_path} fails: {says}") as error:
        trusted.trusted_outputs(Source(str(tmp_path), {}, None, None, trusted=True), "fill-mask", ROWS)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_code(checkpoint, monkeypatch):
    request = {"model": str(checkpoint("hybrid")), "hub": {}, "classes": ["AutoModelForMaskedLM", "AutoModel"]}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    with pytest.raises(SystemExit, match=r"auto_map in config.json names no AutoModelForMaskedLM or AutoModel"):
        run_trusted.main()


def test_a_causal_graph_is_not_kept(made, tmp_path, monkeypatch):
    """The same weights under the decoder's blocks: what a loader without the checkpoint's code computes."""
    from dataclasses import replace

    from optimum_lfm2.families import encoder, lfm2

    causal = {
        name: replace(kind, mixer=lfm2.LAYER_KINDS[name].mixer, prepare=lfm2.LAYER_KINDS[name].prepare)
        for name, kind in encoder.LAYER_KINDS.items()
    }
    monkeypatch.setattr("optimum_lfm2.families.MEMBERS", (lfm2.MEMBER, replace(encoder.MEMBER, layer_kinds=causal)))
    with pytest.raises(Lfm2Error, match="differs from transformers"), errors_as_they_are():
        main_export(str(made("encoder")), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--task fill-mask", "Lfm2BidirectionalModel is exported for feature-extraction"),
        ("--task text-generation-with-past", "Lfm2BidirectionalModel is exported for feature-extraction"),
        ('--model-kwargs {"cache_names":"genai"}', "cache_names"),
        ('--model-kwargs {"num_logits_to_keep":"required"}', "num_logits_to_keep"),
    ],
)
def test_options_that_an_encoder_has_not(options, says, made, cli, out):
    code, err = cli("export", "onnx", "--model", made("encoder"), out, *options.split())
    assert (code, err.count("\n")) == (1, 1)
    assert says in err


def test_an_encoder_does_not_generate(export):
    with pytest.raises(Lfm2Error, match="is an encoder"):
        ORTModelForCausalLM.from_pretrained(export("masked_lm"))


def test_labels_that_cannot_be_counted(made, cli, out, tmp_path):
    source = shutil.copytree(made("token_classifier"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"id2label": {"0": "O", "2": "NAME"}}
    (source / "config.json").write_text(json.dumps(config))
    code, err = cli("export", "onnx", "--model", source, out)
    assert (code, err.count("\n")) == (1, 1)
    assert "id2label" in err

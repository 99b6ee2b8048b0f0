"""What a checkpoint holds and an export does not use: one warning, or a refusal that names whose it is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import changed_copy, gold_tokens, make_encoder, prompts
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from publishing import run as publish
from transformers import AutoModelForCausalLM

from optimum_lfm2 import compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.loading.notices import warn_once
from optimum_lfm2.loading.tasks_manager import Lfm2TasksManager


Tensors = dict[str, torch.Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# transformers 5.24 uses a second head, and tests/loading/test_ties.py looks at it.
UNUSED_ON_4 = pytest.mark.skipif(compat.KEEPS_BOTH_HEADS, reason="this transformers uses a second head")
LAYER = "model.layers.0.feed_forward.w1"


@pytest.fixture
def said(caplog) -> Callable[[], list[str]]:
    """`said()` returns the warnings of this package until now."""
    warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("optimum_lfm2")]


def load(folder: Path, task: str = "text-generation-with-past") -> None:
    Lfm2TasksManager.get_model_from_task(task, str(folder), library_name="transformers")


def adapted(tensors: Tensors) -> None:
    for part, shape in (("A", (4, 64)), ("B", (64, 4))):
        tensors[f"model.layers.0.conv.in_proj.lora_{part}.default.weight"] = torch.ones(shape)


def deeper(tensors: Tensors) -> None:
    tensors |= {name.replace(".3.", ".5."): value.clone() for name, value in tensors.items() if ".layers.3." in name}


@pytest.mark.parametrize(
    ("change", "first", "more", "says"),
    [
        pytest.param(adapted, "model.layers.0.conv.in_proj.lora_A.default.weight", 1, "merge_and_unload", id="lora"),
        pytest.param(lambda t: t.update({f"{LAYER}.bias": torch.ones(96)}), f"{LAYER}.bias", 0, "no such", id="bias"),
        pytest.param(deeper, "model.layers.5.conv.conv.weight", 7, "no such", id="a layer too many"),
        pytest.param(
            lambda t: t.update({HEAD: t[EMBEDDING] + 1}), HEAD, 0, "ties", id="a second head", marks=UNUSED_ON_4
        ),
    ],
)
def test_tensors_that_nobody_reads(change, first, more, says, checkpoint, tmp_path, said):
    folder = changed_copy(checkpoint("hybrid"), tmp_path, change)
    load(folder)
    load(folder)
    (line,) = said()
    assert line.startswith(f"{folder}: {first} {f'and {more} more stored tensors are' if more else 'is'} not used.")
    assert says in line
    assert "\n" not in line


def computed(tensors: Tensors) -> None:
    tensors["model.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


@pytest.mark.parametrize("change", [computed, lambda t: t.update({HEAD: t[EMBEDDING].clone()})])
def test_what_changes_nothing(change, checkpoint, tmp_path, said):
    load(changed_copy(checkpoint("hybrid"), tmp_path, change))
    assert said() == []


def test_what_another_task_leaves_out(checkpoint, tmp_path, said):
    load(checkpoint("untied"), "feature-extraction")
    load(make_encoder("masked_lm_untied", tmp_path), "feature-extraction")
    assert said() == []


def test_both_forms_of_a_towers_names(vl_checkpoint, tmp_path, said):
    def other_form(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".vision_tower." in name]:
            short = name.replace(".vision_tower.vision_model.", ".vision_tower.")
            long = short.replace(".vision_tower.", ".vision_tower.vision_model.")
            tensors[long if name == short else short] = tensors.pop(name)

    load(vl_checkpoint, "image-text-to-text")
    load(changed_copy(vl_checkpoint, tmp_path, other_form), "image-text-to-text")
    assert said() == []


def test_experts_in_either_form(checkpoint, tmp_path, said):
    load(checkpoint("moe"))
    assert said() == []
    load(
        changed_copy(checkpoint("moe"), tmp_path, lambda t: t.update({"model.layers.4.feed_forward.a": torch.ones(1)}))
    )
    assert "model.layers.4.feed_forward.a is not used" in "".join(said())


@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        (lambda name: f"_orig_mod.{name}", "torch.compile"),
        (lambda name: name.replace("layers.1.", "layers.1._orig_mod."), "torch.compile"),
        (lambda name: f"base_model.model.{name}", "merge_and_unload"),
        (lambda name: name.replace("w1.weight", "w1.base_layer.weight"), "merge_and_unload"),
        (lambda name: f"module.{name}", "DataParallel"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "unwrap_model"),
    ],
)
def test_names_of_other_programs(renamed, says, checkpoint, tmp_path):
    def rename(tensors: Tensors) -> None:
        before = dict(tensors)
        tensors.clear()
        tensors |= {renamed(name): value for name, value in before.items()}

    folder = changed_copy(checkpoint("hybrid"), tmp_path, rename)
    with pytest.raises(Lfm2Error, match=says) as error:
        load(folder)
    assert "\n" not in str(error.value)
    assert "Download" not in str(error.value)


def test_kernels_as_mlx_stores_them(checkpoint, tmp_path):
    def turn(tensors: Tensors) -> None:
        tensors |= {name: value.mT.contiguous() for name, value in tensors.items() if name.endswith("conv.conv.weight")}

    with pytest.raises(Lfm2Error, match=r"\(64, 3, 1\).* of MLX. Export the checkpoint that it was converted from"):
        load(changed_copy(checkpoint("hybrid"), tmp_path, turn))


MLX = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization": MLX}, "quantization in config.json says MLX"),
        ({"quantization": MLX, "quantization_config": MLX}, "quantization_config in config.json says MLX"),
        ({"quantization": None}, None),
        ({"quantization_config": None}, None),
    ],
)
def test_settings_of_mlx_and_no_settings(change, says, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("hybrid"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if says is None:
        load(folder)
        return
    with pytest.raises(Lfm2Error, match=says):
        load(folder)


def test_a_quantization_of_null_counts_as_none(checkpoint, tmp_path):
    """As training tools write it. transformers 4.57 and optimum-onnx 0.1.0 fail on it."""
    folder = shutil.copytree(checkpoint("hybrid"), tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    main_export(str(folder), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    (row,) = prompts([5])
    gold = gold_tokens(AutoModelForCausalLM.from_pretrained(checkpoint("hybrid")).eval(), row, 8)
    loads = [lambda: ORTModelForCausalLM.from_pretrained(tmp_path / "out")]
    if compat.READS_NULL_QUANTIZATION:
        loads.append(lambda: ORTModelForCausalLM.from_pretrained(folder, export=True))
    else:
        with pytest.raises(Lfm2Error, match="is null, which this transformers cannot read"):
            ORTModelForCausalLM.from_pretrained(folder, export=True)
    for load_ in loads:
        text = load_().generate(row[None], do_sample=False, max_new_tokens=8, eos_token_id=None)
        assert text[0, 5:].tolist() == gold


ADAPTER = "has a PEFT adapter (adapter_config.json) beside the model, and it is ignored"


@pytest.fixture
def with_adapter(checkpoint, tmp_path) -> Path:
    folder = shutil.copytree(checkpoint("trained"), tmp_path / "merged")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "LiquidAI/LFM2-350M"}))
    (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return folder


def test_an_adapter_beside_a_whole_model(with_adapter, tmp_path, said, cli, caplog):
    def main(out: Path) -> None:
        main_export(str(with_adapter), out, do_validation=False)

    ways = {
        "export onnx": lambda out: cli("export", "onnx", "--model", with_adapter, out),
        "export lfm2": lambda out: publish("--model", with_adapter, out, "--precisions", "q4", "q8"),
        "main_export": main,
        "export=True": lambda _: ORTModelForCausalLM.from_pretrained(with_adapter, export=True),
    }
    for name, way in ways.items():
        warn_once.cache_clear()
        caplog.clear()
        way(tmp_path / name.replace(" ", "-"))
        (line,) = said()
        assert line.startswith(f"{with_adapter} {ADAPTER}")
        assert "merge_and_unload" in line

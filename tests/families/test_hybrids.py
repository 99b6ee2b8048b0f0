"""Granite 4.0 H and Olmo-Hybrid: the tests of `test_modeling.py` over their states, and what they have besides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from checkpoints import (
    ATTENTION,
    DELTA,
    GRANITE_ATTENTION,
    MAMBA,
    changed_copy,
    gold_tokens,
    make_checkpoint,
    prompts,
)
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from test_modeling import (  # noqa: F401  tests and fixtures, which run here over the checkpoints below
    GREEDY,
    NEW,
    decode,
    model,
    pad,
    test_a_mask_with_holes,
    test_batch_is_its_rows_alone_with_and_without_io_binding,
    test_beams_of_padded_rows,
    test_chat_goes_on_from_the_returned_cache,
    test_chats_of_several_rows_with_padding_in_every_turn,
    test_chunked_prefill,
    test_io_binding_can_change_in_the_middle,
    test_long_prompts_run_in_chunks_of_their_own,
    test_right_padding_then_decoding,
)

from optimum_lfm2 import command, compat
from optimum_lfm2.command import run_export
from optimum_lfm2.configs import Lfm2OnnxConfig
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import granite, member_of, olmo_hybrid
from optimum_lfm2.graph import call, delta, mamba
from optimum_lfm2.graph.member import Factors
from optimum_lfm2.loading import supported
from optimum_lfm2.loading.source import is_ours
from optimum_lfm2.registration import claim, register_members
from optimum_lfm2.validation.decoder import errors_as_they_are


# Two layers, where an export is of one of them.
SMALL = {
    "granite": {"num_hidden_layers": 2, "layer_types": [MAMBA, GRANITE_ATTENTION]},
    "olmo": {"num_hidden_layers": 2, "layer_types": [DELTA, ATTENTION]},
}
needs_olmo = pytest.mark.skipif("olmo_hybrid" in compat.STAND_INS, reason="this transformers has no Olmo-Hybrid")


@pytest.fixture(scope="module", params=["granite", "olmo"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def exported(name, exported):
    """The checkpoint in turn, where the tests ask for `hybrid`."""
    return lambda _, **options: exported(name, **options)


@pytest.fixture(scope="module")
def small(name, made_once) -> Path:
    """A checkpoint of two layers."""
    return made_once(f"small-{name}", lambda place: make_checkpoint(name, place, **SMALL[name])) / name


@pytest.fixture(scope="module")
def gold_model(name, gold_model):
    return lambda _: gold_model(name)


@pytest.fixture
def either(model):  # noqa: F811
    """With io-binding alone. `test_io_binding_can_change_in_the_middle` has both."""
    return model


@pytest.fixture(scope="module")
def gold(gold_model):
    @cache
    def gold(length: int) -> tuple[torch.Tensor, list[int]]:
        (prompt,) = prompts([length])
        return prompt, gold_tokens(gold_model("hybrid"), prompt, NEW)

    return gold


def test_candidates_from_the_prompt_are_taken_back_by_running_tokens_again(model, gold):  # noqa: F811
    """A recurrent state is the sum of all tokens. No token can be taken out of it."""
    prompt, tokens = gold(30)
    again = torch.cat([prompt, torch.tensor(tokens), prompt[:8]])[None]
    alone = model.generate(again, **GREEDY)
    assert model.generate(again, prompt_lookup_num_tokens=4, **GREEDY).tolist() == alone.tolist()
    assert not model.layout.gives_columns


def test_config_json_has_the_published_names_of_layers(name, exported):
    """Transformers.js finds the caches of Granite by these alone. transformers 5.24 writes others."""
    config = json.loads((exported("hybrid") / "config.json").read_text())
    kinds = {"granite": {"mamba", "attention"}, "olmo": {"linear_attention", "full_attention"}}
    assert set(config["layer_types"]) == kinds[name]
    assert "Infinity" not in (exported("hybrid") / "config.json").read_text()


def signature(file: Path, layer: int) -> dict[str, tuple]:
    inputs = (value for value in ir.load(file).graph.inputs if f".{layer}" in value.name)
    return {value.name: (value.dtype.name, *value.shape[1:]) for value in inputs}


STATES = {
    ("granite", "hub"): {"past_conv.0": ("FLOAT16", 176, 4), "past_ssm.0": ("FLOAT", 8, 24, 16)},
    ("granite", "genai"): {"past.0.conv": ("FLOAT16", 176, 4), "past.0.recurrent": ("FLOAT", 8, 24, 16)},
    ("olmo", "hub"): {
        "past_conv.0.query": ("FLOAT16", 48, 4),
        "past_conv.0.key": ("FLOAT16", 48, 4),
        "past_conv.0.value": ("FLOAT16", 80, 4),
        "past_recurrent.0": ("FLOAT", 4, 12, 20),
    },
    ("olmo", "genai"): {"past.0.conv": ("FLOAT16", 176, 4), "past.0.recurrent": ("FLOAT", 4, 12, 20)},
}


@pytest.mark.parametrize("names", ["hub", "genai"])
def test_half_precision_and_names(name, names, small, tmp_path):
    """The state of a recurrence is float32 in every file. Under genai's names Olmo-Hybrid has one conv state."""
    with errors_as_they_are():
        main_export(str(small), tmp_path, dtype="fp16", model_kwargs={"cache_names": names})
    assert signature(tmp_path / "model.onnx", 0) == STATES[name, names]
    half, rows = ORTModelForCausalLM.from_pretrained(tmp_path), prompts([9, 1, 30])
    batch = half(**pad(rows, "left")).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(batch[i, 30 - len(row) :], half(row[None]).logits[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("options", [{"variant": "q8"}, {"variant": "q4s", "dtype": "fp16"}], ids=str)
def test_quantised(options, small, tmp_path):
    with errors_as_they_are():
        main_export(str(small), tmp_path, **options)


# A change of the graph's code, and the member whose validation sees it.
def scaled(module: Any, index: int, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """Multiply an argument of the recurrence."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        real = module.linear_attention

        def wrong(*arguments):
            changed = list(arguments)
            changed[index] = changed[index] * factor
            return real(*changed)

        monkeypatch.setattr(module, "linear_attention", wrong)

    return change


def changed_record(module: Any, **fields: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = replace(module.MEMBER, **fields)
        families = __import__("optimum_lfm2.families", fromlist=["MEMBERS"])
        members = tuple(wrong if member is module.MEMBER else member for member in families.MEMBERS)
        monkeypatch.setattr(families, "MEMBERS", members)

    return change


def shown(module: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Let hidden tokens into the states."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        name = "prepare_mamba" if module is granite else "prepare_delta"
        kinds = {
            key: replace(kind, prepare=partial(everything, kind.prepare))
            if kind.prepare is getattr(module, name)
            else kind
            for key, kind in module.MEMBER.layer_kinds.items()
        }
        changed_record(module, layer_kinds=kinds, packed=None)(monkeypatch)

    return change


def everything(prepare: Any, *arguments: Any) -> call.ConvCall:
    shared = prepare(*arguments)
    return replace(shared, visible=torch.ones_like(shared.visible))


MUTANTS = {
    "granite: decay": ("granite", scaled(mamba, 4, 1.02)),
    "granite: value": ("granite", scaled(mamba, 2, 1.01)),
    "granite: hidden tokens": ("granite", shown(granite)),
    "granite: the embedding's factor": (
        "granite",
        changed_record(granite, factors=lambda c: replace(granite.factors(c), embedding=11.9)),
    ),
    "granite: the blocks' factor": (
        "granite",
        changed_record(granite, factors=lambda c: replace(granite.factors(c), residual=0.71)),
    ),
    "granite: no factors": ("granite", changed_record(granite, factors=lambda c: Factors())),
    "olmo: decay": ("olmo", scaled(delta, 4, 1.02)),
    "olmo: beta": ("olmo", scaled(delta, 5, 0.99)),
    "olmo: hidden tokens": ("olmo", shown(olmo_hybrid)),
}


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(name, marks=pytest.mark.once) if name.startswith("granite") else name for name in MUTANTS],
)
def test_validation_sees_a_mistake(mutant, tmp_path, monkeypatch):
    name, change = MUTANTS[mutant]
    source = make_checkpoint(name, tmp_path / "source", **SMALL[name])
    change(monkeypatch)
    with pytest.raises(Lfm2Error, match="differs from transformers"), errors_as_they_are():
        main_export(str(source), tmp_path / "wrong")


def refused(source: Path, out: Path, message: str, **changes: Any) -> None:
    path = source / "config.json"
    config = {name: value for name, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
    path.write_text(json.dumps(config))
    with pytest.raises(Lfm2Error, match=message):
        main_export(str(source), out, do_validation=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ...}, "layer_types in config.json is not there"),
        ({"num_local_experts": 4}, "Granite with experts is not exported yet"),
        ({"num_local_experts": ...}, "num_local_experts in config.json is 8"),
        ({"time_step_limit": [0.0, 1.0]}, "time_step_limit in config.json"),
        ({"mamba_d_head": 0}, "mamba_d_head in config.json is 0"),
        ({"mamba_n_groups": 3}, "mamba_n_groups 3 does not divide it"),
        ({"hidden_act": "gelu"}, "hidden_act in config.json"),
    ],
    ids=str,
)
def test_what_granite_refuses(changes, message, tmp_path):
    refused(make_checkpoint("granite", tmp_path / "source", **SMALL["granite"]), tmp_path / "out", message, **changes)


@needs_olmo
def test_what_olmo_refuses(tmp_path):
    source = make_checkpoint("olmo", tmp_path / "source", **SMALL["olmo"])
    refused(source, tmp_path / "out", "linear_num_key_heads 3 does not divide it", linear_num_key_heads=3)


def test_options_and_an_old_onnxruntime(name, small, exported, tmp_path, monkeypatch):
    with pytest.raises(Lfm2Error, match="is the sum of all tokens"):
        main_export(str(small), tmp_path, model_kwargs={"rollback": "columns"})
    title = {"granite": "Granite 4.0 H", "olmo": "Olmo-Hybrid"}[name]
    with pytest.raises(Lfm2Error, match=f"{title} has no variant q3"):
        main_export(str(small), tmp_path, variant="q3")
    monkeypatch.setattr(supported.onnxruntime, "__version__", "1.25.0")
    with pytest.raises(Lfm2Error, match=f"{title} needs onnxruntime 1.25.1"):
        main_export(str(small), tmp_path)
    with pytest.raises(Lfm2Error, match=f"{title} needs onnxruntime 1.25.1"):
        ORTModelForCausalLM.from_pretrained(exported("hybrid"))


def apart(tensors: dict[str, torch.Tensor], parts: tuple[int, ...] | int) -> None:
    """Store kernels in parts, as published files do."""
    for name in [name for name in tensors if ".linear_attn.conv1d." in name]:
        layer = name.split(".linear_attn.")[0]
        for part, piece in zip("qkv", tensors.pop(name).split(parts), strict=True):
            tensors[f"{layer}.linear_attn.{part}_conv1d.weight"] = piece.contiguous()
        # transformers 5.24 saves the published names.
        assert f"{layer}.attention_layer_norm.weight" in tensors


def joined(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".q_conv1d." in name]:
        parts = [tensors.pop(name.replace(".q_conv1d.", f".{part}_conv1d.")) for part in "qkv"]
        tensors[name.replace(".q_conv1d.", ".conv1d.")] = torch.cat(parts)


@needs_olmo
def test_kernels_apart_joined_and_in_the_thirds_of_transformers_524(tmp_path):
    source = make_checkpoint("olmo", tmp_path / "source", **SMALL["olmo"])  # as transformers saves it
    main_export(str(source), tmp_path / "out", do_validation=False)
    expected = (tmp_path / "out" / "model.onnx_data").read_bytes()
    whole = changed_copy(source, tmp_path / "joined", joined)
    for number, sizes in enumerate([None, (48, 48, 80), (59, 59, 58)]):
        path = whole if sizes is None else changed_copy(whole, tmp_path / str(number), partial(apart, parts=sizes))
        main_export(str(path), tmp_path / f"out{number}", do_validation=False)
        assert (tmp_path / f"out{number}" / "model.onnx_data").read_bytes() == expected

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        apart(tensors, (48, 48, 80))
        name = next(name for name in tensors if "v_conv1d" in name)
        tensors[name] = tensors[name][:79].contiguous()

    with pytest.raises(Lfm2Error, match=r"have the shapes \(48, 1, 4\), \(48, 1, 4\), \(79, 1, 4\); together"):
        main_export(str(changed_copy(whole, tmp_path / "cut", cut)), tmp_path / "no", do_validation=False)


def test_a_graph_of_others_with_transformers_order_of_the_state(checkpoint):
    """Exports on the Hub have (heads, value_dim, key_dim). A state is fed back as it comes, in either order."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint("granite"))
    state = next(x.state for x in member_of(config).cache_tensors(config) if x.past == "past_ssm.0")
    assert state.fits((8, 24, 16))
    assert state.fits((8, 16, 24))
    assert not state.fits((8, 16, 16))


def test_optimums_own_configuration_stays_until_ours_is_claimed(checkpoint, monkeypatch):
    """Optimum may learn these types one day. Whoever wants our export then says so."""
    from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
    from optimum.exporters.tasks import TasksManager

    model_type = granite.MEMBER.model_type

    def registered() -> Any:
        return TasksManager.get_exporter_config_constructor(
            "onnx", model_type=model_type, task="text-generation", library_name="transformers"
        ).func

    assert issubclass(registered(), Lfm2OnnxConfig)
    TasksManager.create_register("onnx", overwrite_existing=True)(model_type, "text-generation")(LlamaOnnxConfig)
    try:
        register_members()
        assert registered() is LlamaOnnxConfig
        assert not is_ours(checkpoint("granite"))
        assert is_ours(checkpoint("hybrid"))
        taken = []
        monkeypatch.setattr(command, "staged", lambda output: pytest.fail("it goes to Optimum"))
        run_export(None, taken.append, {"model_type": model_type})
        assert taken == [None]
        claim(model_type)
        assert is_ours(checkpoint("granite"))
        assert issubclass(registered(), Lfm2OnnxConfig)
    finally:
        claim(model_type)
    with pytest.raises(Lfm2Error, match="does not export the type llama"):
        claim("llama")

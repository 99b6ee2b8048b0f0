"""Configuration files as people published them: each with seeded weights, exported, and compared with gold.

Every key is kept. Widths, depth, experts, windows and vocabularies are cut. Attention is peaky, or a wrong rotation
would hide. README.md says what is odd in each file.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from checkpoints import encoder_gold, gold_tokens, prompts, vary
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM
from pictures import gold_vl_tokens, pictures
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from optimum_lfm2 import ORTLfm2VlForConditionalGeneration, compat
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.families.bidirectional import MODELS


HERE = Path(__file__).parent
NEW = 12
LAYERS, VOCABULARY = 5, 512
DECODERS = [
    "lfm2-700m",
    "lfm2-350m",
    "lfm2-350m-web-copy",
    "tiny-random-lfm2",
    "lfm2-2.6b-transcript-onnx",
    "lfm2.5-1.2b-instruct",
    "lfm2.5-350m",
    "lfm2-8b-a1b-onnx",
    "tiny-random-lfm2-moe",
    "lfm3-1.7b",
]
ENCODERS = ["lfm2.5-encoder-350m", "lfm2.5-embedding-350m"]
REFUSED = {
    "bnb-fine-tune": "quantization_config in config.json says bitsandbytes",
    "mlx-4bit": "quantization in config.json says MLX",
    "gliner-encoder": r"The checkpoint is a Lfm2BiModel \(architectures",
    "lfm2.5-encoder-prompt-router": r"The checkpoint is a Lfm2BidirForSequenceRouting \(architectures",
}
# Cut where the file has the key: a file without one keeps transformers' default.
CUTS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "block_ff_dim": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "sliding_window": 8,
    "projector_hidden_size": 40,
}
VISION_CUTS = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_patches": 16,
    "patch_size": 4,
}


def published(folder: str) -> dict[str, Any]:
    return json.loads((HERE / folder / "config.json").read_text(encoding="utf-8"))


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with all its keys, of a size for tests."""
    config = {name: CUTS.get(name, value) for name, value in config.items()}
    if "num_hidden_layers" in config:
        config["num_hidden_layers"] = min(LAYERS, config["num_hidden_layers"])
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:LAYERS]
    if config.get("full_attn_idxs"):
        config["full_attn_idxs"] = [index for index in config["full_attn_idxs"] if index < LAYERS]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(config.get(name), int):
            config[name] %= VOCABULARY
    if "text_config" in config:
        config["text_config"] = cut(config["text_config"])
        config["vision_config"] = config["vision_config"] | VISION_CUTS
    return config


def as_trained(config: dict[str, Any]) -> dict[str, Any]:
    """What gold is computed with: LFM3's rotation under the name by which transformers knows it."""
    config = json.loads(json.dumps(config))
    ropes = config.get("rope_parameters") or {}
    if ropes.get("full_attention", {}).get("partial_rotary_factor", 1) < 1:
        ropes["full_attention"]["rope_type"] = "proportional"
    config.pop("auto_map", None)
    return config


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def make(name: str, work: Path, maker: Any) -> tuple[Path, Path]:
    """Save a seeded checkpoint twice, under the published configuration and under that of its gold."""
    config = cut(published(name))
    gold = write(work / "gold", as_trained(config))
    torch.manual_seed(1)
    model = maker(AutoConfig.from_pretrained(gold)).eval().float()
    vary(model)
    for parameter, values in model.named_parameters():
        if parameter.endswith(("q_layernorm.weight", "q_norm.weight")):
            values.mul_(5)
    kind = getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    if any(model.__class__ is known for known in MODELS.values()):  # no class of transformers: nothing saves it
        tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
        tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
        save_file(tensors, gold / "model.safetensors", metadata={"format": "pt"})
    else:
        model.to(kind).save_pretrained(gold)
    write(gold, as_trained(config))
    source = shutil.copytree(gold, work / "source")
    return write(source, config), gold


def skip_without(name: str) -> None:
    model_type = published(name)["model_type"]
    if model_type in compat.STAND_INS:
        pytest.skip(f"this transformers has no {model_type}")


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder(name, tmp_path):
    skip_without(name)
    source, gold = make(name, tmp_path, AutoModelForCausalLM.from_config)
    main_export(str(source), tmp_path / "out", do_validation=False)
    reference = AutoModelForCausalLM.from_pretrained(gold, dtype=torch.float32).eval()
    own = ORTModelForCausalLM.from_pretrained(tmp_path / "out")
    (ids,) = prompts([40], VOCABULARY)
    with torch.no_grad():
        logits = reference(input_ids=ids[None], use_cache=False).logits
    torch.testing.assert_close(own(ids[None]).logits, logits, atol=2e-4, rtol=2e-4)
    tokens = own.generate(ids[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert tokens[0, len(ids) :].tolist() == gold_tokens(reference, ids, NEW)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in written
    if name == "lfm3-1.7b":
        assert written["rope_parameters"]["full_attention"]["rope_type"] == "proportional"


def states(file: Path, ids: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(file)
    mask = torch.ones_like(ids)[None]
    return torch.from_numpy(session.run(None, {"input_ids": ids[None].numpy(), "attention_mask": mask.numpy()})[0])


def test_a_decoder_without_a_head(tmp_path):
    source, gold = make("colbert-fine-tune", tmp_path, AutoModel.from_config)
    main_export(str(source), tmp_path / "out", do_validation=False)
    (ids,) = prompts([40], VOCABULARY)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(gold, dtype=torch.float32).eval()(ids[None], use_cache=False)[0]
    torch.testing.assert_close(states(tmp_path / "out" / "model.onnx", ids), hidden, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder(name, tmp_path):
    config = published(name)
    task = member_of(config).task(config["architectures"])
    source, gold = make(name, tmp_path, MODELS[task])
    main_export(str(source), tmp_path / "out", do_validation=False)
    (ids,) = prompts([40], VOCABULARY)
    with torch.no_grad():
        output = encoder_gold(gold, task)(ids[None])[0]
    torch.testing.assert_close(states(tmp_path / "out" / "model.onnx", ids), output, atol=2e-4, rtol=2e-4)


def test_pictures_through_a_projector_without_norm(tmp_path):
    """Transformers 4.57 has the norm whatever `projector_use_layernorm` says: its gold is without it too."""
    name, projector = "lfm2.5-vl-1.6b-fine-tune", "multi_modal_projector"

    def maker(config):
        model = AutoModelForImageTextToText.from_config(config)
        getattr(model.model, projector).layer_norm = None
        return model

    source, gold = make(name, tmp_path, maker)
    processor = json.loads((HERE / "tiny-processor-lfm2_vl" / "preprocessor_config.json").read_text())
    sizes = {"encoder_patch_size": VISION_CUTS["patch_size"], "patch_size": VISION_CUTS["patch_size"]}
    (source / "preprocessor_config.json").write_text(json.dumps(processor | sizes))
    main_export(str(source), tmp_path / "out", do_validation=False)
    reference = AutoModelForImageTextToText.from_pretrained(gold, dtype=torch.float32).eval()
    getattr(reference.model, projector).layer_norm = torch.nn.Identity()
    tiles = pictures([(2, 2), (1, 3)], reference.config)
    (text,) = prompts([20], 390)
    ids = torch.cat([text, torch.full((7,), reference.config.image_token_id), text[:5]])
    own = ORTLfm2VlForConditionalGeneration.from_pretrained(tmp_path / "out")
    tokens = own.generate(ids[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None, **tiles)
    assert tokens[0, len(ids) :].tolist() == gold_vl_tokens(reference, ids, tiles, NEW)
    with torch.no_grad():
        logits = reference(input_ids=ids[None], **tiles, use_cache=False).logits
    torch.testing.assert_close(own(input_ids=ids[None], **tiles).logits, logits, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    """The configuration is enough: no weights are read before."""
    with pytest.raises(Lfm2Error, match=REFUSED[name]) as error:
        main_export(str(write(tmp_path / "source", published(name))), tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lfm2-700m", "lfm2-8b-a1b-onnx", "lfm3-omni-2b"])
def test_generation_settings_are_copied(name, tmp_path):
    """All seven that were seen are alike; LFM3-Omni's has a list of end tokens."""
    from optimum_lfm2.loading.companions import generation_settings

    settings = generation_settings(str(HERE / name))
    settings.save_pretrained(tmp_path)
    file = "generation_config.json"
    assert (tmp_path / file).read_bytes() == (HERE / name / file).read_bytes()


def test_every_file_is_used():
    """A folder that is added gets a line above."""
    with_config = {path.parent.name for path in HERE.glob("*/config.json")}
    assert with_config == {*DECODERS, *ENCODERS, *REFUSED, "colbert-fine-tune", "lfm2.5-vl-1.6b-fine-tune"}

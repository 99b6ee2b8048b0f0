"""Models that are not ours: the same files, tokens and errors with this package and without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_lfm2.compat import LFM2_VL_OF_4, STAND_INS, TRANSFORMERS_5


pytestmark = pytest.mark.skipif(TRANSFORMERS_5, reason="without this package optimum-onnx 0.1.0 does not import there")

ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

class HouseConfig(PretrainedConfig):
    model_type = "house"

class HouseModel(PreTrainedModel):
    config_class = HouseConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None):
        hidden = self.embed(input_ids) + self.embed(token_type_ids)
        return BaseModelOutput(last_hidden_state=hidden * attention_mask[..., None])
"""


def _without_stand_ins(answer: str) -> str:
    """What transformers lists of the types that it knows: those that we add are not its own."""
    for name in (*STAND_INS, LFM2_VL_OF_4):
        answer = answer.replace(f"{name}, ", "")
    return answer


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory) -> Path:
    """Make a folder for each model, and for each `no-...` that holds none."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).save_pretrained(folder / "llama")
    BertModel(BertConfig(**SIZES)).save_pretrained(folder / "bert")
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(folder / "bert-lm")

    def write(name: str, file: str, content: object) -> None:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text(content if isinstance(content, str) else json.dumps(content))

    auto_map = {"AutoConfig": "code.HouseConfig", "AutoModel": "code.HouseModel"}
    write(
        "remote", "config.json", SIZES | {"model_type": "house", "architectures": ["HouseModel"], "auto_map": auto_map}
    )
    write("remote", "code.py", REMOTE_CODE)
    save_file({"embed.weight": torch.randn(64, 32)}, folder / "remote" / "model.safetensors", {"format": "pt"})

    write("diffusion", "model_index.json", {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]})
    (folder / "diffusion" / "unet").mkdir()
    write("diffusion/unet", "config.json", {"_class_name": "UNet2DConditionModel"})

    shutil.copytree(checkpoint("trained"), folder / "no-such-tokenizer")
    write("no-such-tokenizer", "config.json", json.loads((folder / "llama" / "config.json").read_text()))
    tokenizer = json.loads((folder / "no-such-tokenizer" / "tokenizer_config.json").read_text())
    write("no-such-tokenizer", "tokenizer_config.json", tokenizer | {"tokenizer_class": "TokenizersBackend"})
    write("no-config", "notes.txt", "nothing")
    write("no-json", "config.json", '{"model_type": "lfm2",')
    write("no-object", "config.json", "[]")
    write("no-type", "config.json", SIZES)
    write("no-known-type", "config.json", SIZES | {"model_type": "lfm2_of_tomorrow"})
    write("no-genai-of-ours", "genai_config.json", {"model": {"type": "llama"}})
    return folder


@pytest.fixture(scope="module")
def found(models, tmp_path_factory) -> dict[str, dict]:
    """Run `others.py` with and without this package at the same time, and return both results."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONHASHSEED"] = "0"  # some errors list a set
    running = {}
    for mode in ("with", "without"):
        folder = tmp_path_factory.mktemp(mode)
        environment["HF_MODULES_CACHE"] = str(folder / "modules")
        command = [sys.executable, str(ROOT / "tests" / "support" / "others.py"), mode, str(models)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[mode] = subprocess.Popen(command, cwd=folder, env=dict(environment), **pipes)
    answers = {mode: (*process.communicate(timeout=300), process.returncode) for mode, process in running.items()}
    for out, err, code in answers.values():
        assert code == 0, out + err
    # transformers lists the types that it knows where it meets another; it knows one more with us.
    return {mode: json.loads(_without_stand_ins(out.splitlines()[-1])) for mode, (out, _, _) in answers.items()}


def test_files_tokens_and_errors_are_the_same(found):
    ours, expected = found["with"], found["without"]
    assert (ours.pop("ours is loaded"), expected.pop("ours is loaded")) == (True, False)
    assert ours.keys() == expected.keys()
    # This is nobody's model: one line instead of a traceback.
    nobodys = "nowhere, by the command"
    assert (ours.pop(nobodys), "error" in expected.pop(nobodys)) == ({"error": ["SystemExit: 1"]}, True)
    assert {name: ours[name] for name in expected if ours[name] != expected[name]} == {}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("remote code, trusted", "model.onnx"),
        ("llama", "model.onnx"),
        ("llama, by the command", "model.onnx"),
        ("llama, loaded", "ORTModelForCausalLM"),
        ("llama, loaded by position", "ORTModelForCausalLM"),
        ("llama, exported while it loads", "ORTModelForCausalLM"),
        ("bert", "model.onnx"),
        ("bert, by the command", "model.onnx"),
        ("remote code, not trusted", "trust_remote_code"),
        ("diffusers, by name", "diffusers"),
        ("a tokenizer of transformers 5", "Tokenizer class TokenizersBackend does not exist"),
        ("no-known-type, exported", "lfm2_of_tomorrow"),
    ],
)
def test_the_comparison_is_of_something(name, what, found):
    """The comparison would also succeed if both runs failed for one reason that lies in the test."""
    answer = found["without"][name]
    assert what in json.dumps(answer)
    assert ("error" in answer) == (what not in ("model.onnx", "ORTModelForCausalLM"))

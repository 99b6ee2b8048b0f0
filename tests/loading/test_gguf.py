"""A GGUF file at the door: its configuration, its tokenizer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import pytest
import real_tokenizer
import torch
from checkpoints import ATTENTION, BASE, CONV
from gguf_files import write_gguf
from safetensors.torch import load_file
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.families import member_of
from optimum_lfm2.loading.gguf import config_of, standing_in
from optimum_lfm2.weights.gguf import GgufFile


DEMO = Path(__file__).parents[2] / "demo" / "checkpoint"
TOKENS = 3000
TEXTS = [
    "Hello world, it's 12345678 o'clock! WE'LL see…",
    "naïve café — 東京 🦙🦙\n\n\n  three   spaces\t\ttab\r\nend ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "don't DON'T x=y**2; // code\n    indented",
    "",
    " ",
]


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Write a tokenizer as llama.cpp's converter does (`get_vocab_base` in conversion/base.py)."""
    own = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list([own.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(
        [
            kinds[added[i].special] if i in added else gguf.TokenType.NORMAL if i in own else gguf.TokenType.UNUSED
            for i in range(rows)
        ]
    )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(token)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def model(rows: int = 256, **changes) -> Lfm2ForCausalLM:
    options = {**BASE, "num_hidden_layers": 2, "layer_types": [CONV, ATTENTION], "vocab_size": rows, "hidden_size": 64}
    options |= {"block_auto_adjust_ff_dim": False, "bos_token_id": None, "pad_token_id": None, "eos_token_id": None}
    return Lfm2ForCausalLM(Lfm2Config(**{**options, **changes}))


def write(path: Path, changes=lambda writer: None, architecture: str = "lfm2", rows: int = 256, **options) -> Path:
    write_gguf(model(rows, **options), path, lambda name: "F32", architecture, changes)
    return path


def test_the_configuration_is_what_transformers_reads(tmp_path):
    options = {"conv_L_cache": 5, "num_key_value_heads": 1, "rope_theta": 500.0, "max_position_embeddings": 99}
    path = write(tmp_path / "x.gguf", bos_token_id=1, eos_token_id=7, pad_token_id=0, **options)
    config = config_of(GgufFile.open(path))
    assert {name: config[name] for name in options} == options
    read = load_gguf_checkpoint(path)["config"]
    heard = {name: value for name, value in read.items() if name not in ("rms_norm_eps", "full_attn_idxs")}
    assert {name: config[name] for name in heard} == heard
    assert config["layer_types"] == [CONV, ATTENTION]
    assert config["architectures"] == ["Lfm2ForCausalLM"]
    assert config["norm_eps"] == pytest.approx(1e-5)


def test_what_the_shape_of_the_table_says_stands_for_the_vocabulary(tmp_path):
    path = write(tmp_path / "x.gguf", rows=300, tie_word_embeddings=False, head_dim=24)
    config = config_of(GgufFile.open(path))
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (300, False)


def test_an_encoder_is_one_by_its_metadata(tmp_path):
    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.CLS)

    config = config_of(GgufFile.open(write(tmp_path / "x.gguf", describe)))
    assert config["architectures"] == ["Lfm2BidirectionalModel"]
    assert member_of(config).encodes
    pooled = write(tmp_path / "pooled.gguf", lambda writer: writer.add_pooling_type(gguf.PoolingType.MEAN))
    assert config_of(GgufFile.open(pooled))["architectures"] == ["Lfm2Model"]


@pytest.fixture(scope="module")
def real(made_once) -> Path:
    """A tokenizer of the real one's shape, which splits as LFM2's does, and the file that holds it."""

    def make(folder: Path) -> None:
        from tokenizers import Regex, pre_tokenizers

        with patch.object(real_tokenizer, "TOKENS", TOKENS):
            real_tokenizer.write_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pattern = (  # LFM2's tokenizer.json
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        tokenizer.save_pretrained(folder)
        write(folder / "model.gguf", lambda writer: add_tokenizer(writer, tokenizer, TOKENS + 100), rows=TOKENS + 100)

    return made_once("gguf-tokenizer", make)


def test_the_tokenizer_of_a_file(real):
    wanted = AutoTokenizer.from_pretrained(real)
    with standing_in(real / "model.gguf") as folder:
        own = AutoTokenizer.from_pretrained(folder)
    assert len(own) == TOKENS, "tokens that fill up the rows are no tokens"
    for text in TEXTS:
        ids = wanted(text, add_special_tokens=False).input_ids
        assert own(text, add_special_tokens=False).input_ids == ids
        assert own(text).input_ids == [wanted.bos_token_id, *ids], "llama.cpp begins each text with the start token"
        assert own.decode(ids) == wanted.decode(ids)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    for options in ({}, {"tools": [real_tokenizer.tool("find", "what")]}, {"add_generation_prompt": True}):
        assert own.apply_chat_template(chat, **options) == wanted.apply_chat_template(chat, **options)
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(own, name) == getattr(wanted, name)
    assert own.decode(own("<|im_start|>x<|im_end|>").input_ids, skip_special_tokens=True) == "x"


def test_another_tokenizer(tmp_path):
    wanted = AutoTokenizer.from_pretrained(DEMO)
    path = write(tmp_path / "x.gguf", rows=len(wanted))
    with standing_in(path) as folder:
        assert not (folder / "tokenizer.json").exists(), "the file has none"
    with standing_in(path, tokenizer=str(DEMO)) as folder:
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == wanted.get_vocab()
    small = write(tmp_path / "small.gguf", rows=100)
    with pytest.raises(Lfm2Error, match="belongs to another model"), standing_in(small, tokenizer=str(DEMO)):
        pass
    with pytest.raises(Lfm2Error, match="--tokenizer nowhere"), standing_in(path, tokenizer="nowhere"):
        pass


def test_the_licence_of_a_file(tmp_path):
    path = write(tmp_path / "x.gguf", lambda writer: (writer.add_license("other"), writer.add_license_name("lfm1.0")))
    with standing_in(path) as folder:
        assert 'license_name: "lfm1.0"' in (folder / "README.md").read_text()


KINDS = {str: "string", int: "uint32"}
REFUSED = {
    "another architecture": ({"architecture": "llama"}, "of the architecture llama"),
    "a key that is not known": ({"key": ("lfm2.attention.sliding_window", 64)}, "what that means"),
    "a scaled rope": ({"key": ("lfm2.rope.scaling.type", "yarn")}, "what that means"),
    "a part of a head that turns": ({"key": ("lfm2.rope.dimension_count", 8)}, "the width of a head"),
    "an impossible value": ({"key": ("lfm2.expert_count", 64)}, "what that means"),
    "a tokenizer of another kind": ({"key": ("tokenizer.ggml.model", "llama")}, "--tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, name, cli):
    options, said = dict(REFUSED[name][0]), REFUSED[name][1]
    if "key" in options:
        key, value = options.pop("key")
        options["changes"] = lambda writer: (writer.add_string if isinstance(value, str) else writer.add_uint32)(
            key, value
        )
    path = write(tmp_path / "x.gguf", **options)
    code, error = cli("export", "onnx", "--model", path, tmp_path / "out")
    (line,) = [line for line in error.splitlines() if line.startswith("optimum-cli")]
    assert (code, str(path) in line, said in line) == (1, True, True), line
    assert not (tmp_path / "out").exists()


def test_metadata_that_lacks_or_twists_a_value(tmp_path):
    path = write(tmp_path / "x.gguf")
    file = GgufFile.open(path)
    for key, value, said in (
        ("lfm2.block_count", None, "does not say lfm2.block_count"),
        ("lfm2.block_count", "2", "lfm2.block_count is 2, which cannot be"),
        ("lfm2.block_count", 3, "no number of heads for each of its 3 layers"),
        ("lfm2.attention.head_count_kv", 2, "which cannot be"),
        ("lfm2.context_length", 0, "max_position_embeddings in"),
        ("lfm2.attention.layer_norm_rms_epsilon", -1.0, "norm_eps in"),
    ):
        metadata = {**file.metadata, key: value}
        if value is None:
            del metadata[key]
        with pytest.raises(Lfm2Error, match=said):
            config_of(GgufFile(path, metadata, file.tensors))
    with pytest.raises(Lfm2Error, match="rope_freqs"):
        config_of(GgufFile(path, file.metadata, {**file.tensors, "rope_freqs.weight": None}))


def test_options_of_gguf_files(tmp_path, cli, checkpoint):
    code, error = cli("export", "onnx", "--model", checkpoint("hybrid"), "--tokenizer", "x", tmp_path / "out")
    assert code == 1
    assert "--tokenizer goes with a GGUF file" in error
    write(tmp_path / "x.gguf")
    for command in ("onnx", "lfm2"):
        code, error = cli("export", command, "--model", tmp_path, "--gguf-file", "y.gguf", tmp_path / "out")
        assert (code, error) == (
            1,
            f"optimum-cli: error: {tmp_path} has no file y.gguf that ends in .gguf. Is it spelled right?\n",
        )


def test_a_tensor_that_is_missing_is_named(tmp_path):
    torch.manual_seed(0)
    own = model()
    del own.model.layers[0].ffn_norm
    write_gguf(own, tmp_path / "x.gguf", lambda name: "F32")
    from optimum_lfm2 import ORTLfm2ForCausalLM

    with pytest.raises(Lfm2Error, match=r"no tensor model.layers.0.ffn_norm.weight"):
        ORTLfm2ForCausalLM.from_pretrained(tmp_path / "x.gguf", export=True)


def test_the_modules_of_an_encoder(tmp_path):
    """Pooling and a dense layer, as sentence-transformers has them in a folder."""
    dense = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).numpy()

    def folder_of(name: str, pooling: gguf.PoolingType, with_dense: bool, causal: bool = False) -> tuple[str, dict]:
        def describe(writer: gguf.GGUFWriter) -> None:
            writer.add_causal_attention(causal)
            writer.add_pooling_type(pooling)
            if with_dense:
                writer.add_embedding_length_out(16)
                writer.add_tensor("dense_2.weight", dense)

        with standing_in(write(tmp_path / f"{name}.gguf", describe)) as folder:
            files = {str(path.relative_to(folder)): path for path in folder.rglob("*.json")}
            read = {name: json.loads(path.read_text()) for name, path in files.items()}
            if with_dense:
                weight = load_file(next(folder.glob("*_Dense")) / "model.safetensors")["linear.weight"]
                assert np.array_equal(weight.numpy(), dense)
            return read["config.json"]["architectures"][0], read

    kind, read = folder_of("pooled", gguf.PoolingType.CLS, with_dense=False)
    assert kind == "Lfm2BidirectionalModel"
    assert [module["path"] for module in read["modules.json"]] == ["", "1_Pooling"]
    pooling = read["1_Pooling/config.json"]
    assert pooling.pop("word_embedding_dimension") == 64
    assert [name for name, used in pooling.items() if used] == ["pooling_mode_cls_token"]

    kind, read = folder_of("colbert", gguf.PoolingType.NONE, with_dense=True, causal=True)
    assert kind == "Lfm2Model", "the width of its vectors says that it predicts no tokens"
    assert [module["type"] for module in read["modules.json"][1:]] == ["pylate.models.Dense"]
    assert (read["1_Dense/config.json"]["in_features"], read["1_Dense/config.json"]["out_features"]) == (64, 16)

    _, read = folder_of("both", gguf.PoolingType.LAST, with_dense=True)
    assert [module["path"] for module in read["modules.json"]] == ["", "1_Pooling", "2_Dense"]
    with pytest.raises(Lfm2Error, match=r"pooling_type is 4, and these are exported: 0 \(none\)"):
        folder_of("rank", gguf.PoolingType.RANK, with_dense=False)

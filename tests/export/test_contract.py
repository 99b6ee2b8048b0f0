"""The interface of an exported file: names, order, shapes, files and values, seen by plain onnxruntime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import CHECKPOINTS, gold_tokens, prompts
from optimum.exporters.onnx import main_export


NEW = 16


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def generate(session: onnxruntime.InferenceSession, ids: np.ndarray, mask: np.ndarray, count: int) -> list[list[int]]:
    """Return greedy tokens of rows, by a loop that reads only the session's inputs and zips present to past.

    The first new token comes from the logits of each row's last unmasked token, since either side may be padded.
    """
    batch = len(ids)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    caches = {
        value.name: np.zeros(
            [{"batch_size": batch, "past_sequence_length": 0}.get(size, size) for size in value.shape], np.float32
        )
        for value in session.get_inputs()
        if value.name in names
    }
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
    tokens: list[np.ndarray] = []
    while len(tokens) < count:
        logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **caches})
        tokens.append(logits[np.arange(batch), last].argmax(-1))
        caches = dict(zip(names, present, strict=True))
        ids, last = tokens[-1][:, None], np.zeros(batch, dtype=np.int64)
        mask = np.concatenate([mask, np.ones((batch, 1), dtype=np.int64)], axis=1)
    return np.stack(tokens, axis=1).tolist()


def padded(rows: list[torch.Tensor], side: str) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 9), np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_plain_loop_generates_the_gold(name, exported, gold_model):
    session = open_session(exported(name) / "model.onnx")
    rows = prompts([9, 1, 20])
    golds = [gold_tokens(gold_model(name), row, NEW) for row in rows]
    for row, gold in zip(rows, golds, strict=True):
        assert generate(session, row[None].numpy(), np.ones((1, len(row)), dtype=np.int64), NEW) == [gold]
    for side in ("left", "right"):
        assert generate(session, *padded(rows, side), NEW) == golds, side


def test_signature(exported):
    model = onnx.load(exported("hybrid") / "model.onnx", load_external_data=False)

    def described(values):
        return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]

    total = "past_sequence_length + sequence_length"
    key = ["batch_size", 2, "past_sequence_length", 16]
    assert described(model.graph.input) == [
        ("input_ids", ["batch_size", "sequence_length"]),
        ("attention_mask", ["batch_size", total]),
        ("past_conv.0", ["batch_size", 64, 3]),
        ("past_conv.1", ["batch_size", 64, 3]),
        ("past_key_values.2.key", key),
        ("past_key_values.2.value", key),
        ("past_conv.3", ["batch_size", 64, 3]),
        ("past_key_values.4.key", key),
        ("past_key_values.4.value", key),
        ("num_logits_to_keep", []),
    ]
    key = ["batch_size", 2, total, 16]
    assert described(model.graph.output) == [
        ("logits", ["batch_size", "num_logits", 256]),
        ("present_conv.0", ["batch_size", 64, 3]),
        ("present_conv.1", ["batch_size", 64, 3]),
        ("present.2.key", key),
        ("present.2.value", key),
        ("present_conv.3", ["batch_size", 64, 3]),
        ("present.4.key", key),
        ("present.4.value", key),
    ]
    assert not model.graph.input[-1].type.tensor_type.HasField("shape")  # it takes a scalar or a vector of one element


@pytest.mark.parametrize(("keep", "count"), [(None, 9), (0, 9), (1, 1), (3, 3), (99, 9), ([0], 9), ([1], 1)], ids=repr)
def test_num_logits_to_keep(keep, count, exported):
    session = open_session(exported("hybrid", task="text-generation") / "model.onnx")
    inputs = {"input_ids": prompts([9])[0][None].numpy(), "attention_mask": np.ones((1, 9), dtype=np.int64)}
    (every,) = session.run(None, inputs)
    (logits,) = session.run(None, inputs if keep is None else inputs | {"num_logits_to_keep": np.array(keep)})
    np.testing.assert_allclose(logits, every[:, 9 - count :], atol=1e-6)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_file(name, exported, gold_model):
    folder = exported(name)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert model.ir_version <= 10
    assert {entry.domain for entry in model.opset_import} <= {"", "com.microsoft"}
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {
        "model.onnx_data"
    }
    for tensor in model.graph.initializer:
        size = np.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        assert (tensor in external) == (size >= 1024), tensor.name
    tables = [
        tensor for tensor in model.graph.initializer if list(tensor.dims) == [256, gold_model(name).config.hidden_size]
    ]
    assert len(tables) == (1 if gold_model(name).config.tie_word_embeddings else 2)
    weights = sum(parameter.numel() * 4 for parameter in gold_model(name).parameters())
    written = sum((folder / file).stat().st_size for file in ("model.onnx", "model.onnx_data"))
    assert weights * 0.95 < written < weights + 300_000
    assert (folder / "model.onnx").stat().st_size < 200_000
    a_layer = 70 if any(part in name for part in ("moe", "lfm3", "olmo")) else 50
    assert sum(node.op_type != "Constant" for node in model.graph.node) <= a_layer * 5
    read = {value for node in model.graph.node for value in node.input} | {value.name for value in model.graph.output}
    norms = [node for node in model.graph.node if node.op_type == "SkipSimplifiedLayerNormalization"]
    unread = {value for node in norms for value in node.output} - {"", *read}
    assert unread <= {norms[-1].output[3]}  # the last layer's sum, which validation reads


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rope_scaling_that_depends_on_the_configuration_alone(scaling, gold_model, tmp_path):
    from transformers import Lfm2ForCausalLM

    gold_model("hybrid").save_pretrained(tmp_path / "source")
    config = gold_model("hybrid").config.to_dict() | {"rope_scaling": scaling}
    type(gold_model("hybrid").config)(**config).save_pretrained(tmp_path / "source")
    main_export(str(tmp_path / "source"), tmp_path / "out", do_validation=False, task="text-generation")
    gold = Lfm2ForCausalLM.from_pretrained(tmp_path / "source").eval()
    assert gold.model.rotary_emb.rope_type == scaling["rope_type"]
    (prompt,) = prompts([200])
    with torch.no_grad():
        expected = gold(input_ids=prompt[None], use_cache=False).logits.numpy()
    inputs = {"input_ids": prompt[None].numpy(), "attention_mask": np.ones((1, 200), dtype=np.int64)}
    (logits,) = open_session(tmp_path / "out" / "model.onnx").run(None, inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# Validation can fail


@pytest.mark.parametrize("target", ["--avx512_vnni", "--arm64"])
def test_optimum_quantizes_the_result(target, exported, gold_model, tmp_path, monkeypatch):
    import sys

    from optimum.commands.optimum_cli import main

    source = shutil.copytree(exported("hybrid"), tmp_path / "source")
    arguments = ["optimum-cli", "onnxruntime", "quantize", "--onnx_model", source, target, "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    main()
    (path,) = (tmp_path / "out").glob("*.onnx")
    (row,) = prompts([9])
    session = open_session(path)
    feeds = {"input_ids": row[None].numpy(), "attention_mask": np.ones((1, 9), dtype=np.int64)}
    feeds |= {
        value.name: np.zeros(
            [{"batch_size": 1, "past_sequence_length": 0}.get(size, size) for size in value.shape], np.float32
        )
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])
    with torch.no_grad():
        expected = gold_model("hybrid")(input_ids=row[None], use_cache=False).logits
    similarity = torch.cosine_similarity(logits, expected, dim=-1)
    assert 0.97 < similarity.min() < 0.999999, "weights in 8 bits are near those in float, and not the same"
    model = onnx.load(path, load_external_data=False)
    assert any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul") for node in model.graph.node)

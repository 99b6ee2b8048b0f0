"""`--model-kwargs`: what it says holds for one export, and nothing else sets it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from optimum.exporters.onnx import main_export
from transformers import AutoConfig

from optimum_lfm2 import Lfm2OnnxConfig
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.export.model_kwargs import VALUES, ExportOptions


def test_the_first_value_is_the_default():
    default = ExportOptions(**{k: v[0] for k, v in VALUES.items()})
    assert ExportOptions.read(None, quantized=False) == ExportOptions.read({}, quantized=True) == default


@pytest.mark.parametrize("given", [[], "fused", {"embeding": "float"}, {"embedding": ["fused"]}, {"cache_names": None}])
def test_anything_else_is_refused_in_one_line(given):
    with pytest.raises(Lfm2Error, match=r"This model knows embedding \(fused, portable, float\), cache_names") as error:
        ExportOptions.read(given, quantized=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", VALUES["embedding"])
def test_embedding_of_an_export_that_is_not_quantised_is_refused(value, checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="this export is not quantised"):
        main_export(str(checkpoint("hybrid")), tmp_path, model_kwargs={"embedding": value})
    assert not list(tmp_path.glob("*.onnx*"))


@pytest.mark.parametrize("given", [{}, {"num_logits_to_keep": "optional"}, {"num_logits_to_keep": "required"}], ids=str)
def test_num_logits_to_keep_has_a_default_or_none(given, checkpoint, tmp_path):
    main_export(str(checkpoint("hybrid")), tmp_path, do_validation=False, model_kwargs=given)
    graph = ir.load(tmp_path / "model.onnx").graph
    assert "num_logits_to_keep" in [value.name for value in graph.inputs]
    assert ("num_logits_to_keep" in graph.initializers) == (given.get("num_logits_to_keep") != "required")


@pytest.mark.parametrize("value", VALUES["num_logits_to_keep"])
def test_num_logits_to_keep_of_a_graph_without_logits_is_refused(value, checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="no input of a graph for feature-extraction"):
        main_export(
            str(checkpoint("hybrid")), tmp_path, task="feature-extraction", model_kwargs={"num_logits_to_keep": value}
        )


def test_a_cache_of_sliding_attention_without_sliding_attention_is_refused(checkpoint, tmp_path):
    with pytest.raises(Lfm2Error, match="lfm2 has no sliding attention"):
        main_export(str(checkpoint("hybrid")), tmp_path, model_kwargs={"sliding_cache": "growing"})


@pytest.mark.parametrize("name", ["embedding", "cache_names", "weights"])
def test_a_configuration_cannot_be_set(name, checkpoint):
    config = Lfm2OnnxConfig(AutoConfig.from_pretrained(checkpoint("hybrid")), task="text-generation")
    with pytest.raises(AttributeError):
        setattr(config, name, "portable")

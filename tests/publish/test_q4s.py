"""`export lfm2 --precisions q4s`: a variant that is written only where it is asked for. And what the command prints."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest
from node import WEB, needs_node
from publishing import TEXT, TRAINED, answer, genai_weights, js_config, rows, run

from optimum_lfm2.publish.card import write_card


NODE = """
const { pipeline, env } = require("@huggingface/transformers");
env.allowRemoteModels = false;
env.localModelPath = process.argv[1];
(async () => {
  const generator = await pipeline("text-generation", process.argv[2], { dtype: "fp32", model_file_name: "model_q4s" });
  const chat = [{ role: "user", content: "What is 3 plus 4?" }];
  const [{ generated_text }] = await generator(chat, { max_new_tokens: 64 });
  console.log(generated_text.at(-1).content);
})();
"""


@pytest.fixture(scope="module")
def written(two, tmp_path_factory) -> Path:
    """A folder of fp32 and q4, to which q4s was added, with what the command printed. Never write to it."""
    folder = shutil.copytree(two, tmp_path_factory.mktemp("q4s") / "out")
    with pytest.MonkeyPatch.context() as patched:
        printed: list[str] = []
        patched.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert run("--model", TRAINED, *TEXT, "--repo-id", "me/small", "--precisions", "q4s", folder) == 0
    (folder.parent / "printed").write_text("\n".join(printed))
    return folder


def test_the_file(written):
    graph = ir.load(written / "onnx" / "model_q4s.onnx").graph
    assert {node.attributes.get_int("bits") for node in graph if node.op_type == "MatMulNBits"} == {4}
    assert js_config(written)["use_external_data_format"]["model_q4s.onnx"]
    assert answer(written, subfolder="onnx", file_name="model_q4s.onnx") == "3 plus 4 is 7."


def test_q4_stays_the_one_that_others_take(written):
    assert list(rows(written)) == ["fp32", "q4", "q4s"]
    assert genai_weights(written) == {"model_q4.onnx_data"}
    card = (written / "README.md").read_text()
    assert 'subfolder="onnx", file_name="model_q4.onnx"' in card
    assert '{ dtype: "q4" }' in card
    assert '{ dtype: "fp32", model_file_name: "model_q4s" }' in card


def test_the_command_says_what_it_wrote(written):
    progress, _, said = (written.parent / "printed").read_text().partition("\n\n")
    assert progress.splitlines()[0] == "q4s: written and checked"
    title, *files = said.splitlines()[1:5]
    assert title.split("  ")[0] == "precision"
    sizes = [str(path.stat().st_size) for path in written.glob("onnx/model_q4s.onnx*")]
    (small,) = (line.split() for line in files if line.startswith("q4s "))
    assert small[1:3] == ["onnx/model_q4s.onnx", f"{sum(map(int, sizes)) / 1e6:.2f}"]
    assert 0 < float(small[3]) < 1e-3
    assert "slight (KL divergence" in " ".join(small)
    assert next(line for line in files if line.startswith("q4 ")).endswith("not measured")
    assert (
        f'  model = ORTLfm2ForCausalLM.from_pretrained("{written}", subfolder="onnx", file_name="model_q4.onnx")'
        in said
    )
    assert f"  hf upload me/small {written}" in said
    assert "--license" in said


@pytest.mark.once
@needs_node
def test_transformers_js_runs_the_file_by_its_name(written):
    """It has no such dtype."""
    command = ["node", "-e", NODE, str(written.parent), written.name]
    done = subprocess.run(command, cwd=WEB, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "3 plus 4 is 7.", done.stderr


@pytest.mark.parametrize("url", [None, "https://example.org/optimum-lfm2"])
def test_the_card_says_how_to_install_and_which_licence(url, written, tmp_path, monkeypatch):
    from optimum_lfm2.publish import card
    from optimum_lfm2.publish.precisions import published

    folder = shutil.copytree(written, tmp_path / "out")
    monkeypatch.setattr(card, "repository", lambda: url)
    options = card.CardOptions(None, "me/base", "mit")
    assert write_card(folder, published(folder), folder, str(TRAINED), options) == card.Card("me/small", "mit")
    text = (folder / "README.md").read_text()
    pip = f'"optimum-lfm2[onnxruntime] @ git+{url}"' if url else '".[onnxruntime]"'
    assert f"\npip install {pip}\n" in text
    assert ("[optimum-lfm2](https://example.org/optimum-lfm2)" in text) == bool(url)
    assert "[me/base](https://huggingface.co/me/base) for ONNX Runtime" in text
    assert text.rstrip().endswith("so its licence holds for them: mit.")
    assert not json.dumps(text).count("{{")

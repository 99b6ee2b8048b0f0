"""The model card of a published folder. It shows how to run the files and how much quality each precision loses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import CONFIG_NAME, cached_file

from optimum_lfm2.families import member_of
from optimum_lfm2.file_names import DECODER, EMBEDDING, VISION
from optimum_lfm2.graph.member import Member
from optimum_lfm2.publish.encoder_card import TEMPLATE as ENCODER_TEMPLATE
from optimum_lfm2.publish.encoder_card import encoder_values
from optimum_lfm2.publish.precisions import PRECISIONS, Published, preferred
from optimum_lfm2.publish.table import Column, file_table
from optimum_lfm2.publish.vision_card import TEMPLATE as VISION_TEMPLATE
from optimum_lfm2.publish.vision_card import vision_values
from optimum_lfm2.sidecars.genai_config import GENAI_CONFIG


CARD = "README.md"
LICENSE = "LICENSE"
LICENSE_FIELDS = ("license", "license_name", "license_link", "language")
TAGS = ["onnx", "onnxruntime"]
GENAI = "onnxruntime-genai"
JAVASCRIPT = "transformers.js"
SENTENCE_TRANSFORMERS = "sentence-transformers"

COLUMNS: tuple[Column, ...] = (
    ("precision", lambda file: file.precision),
    ("file", lambda file: f"`onnx/{file.path.name}`"),
    ("MB", lambda file: f"{file.size / 1e6:.4g}"),
    ("weights", lambda file: PRECISIONS[file.precision].weights),
    ("differs by", lambda file: f"{file.difference:.2g}"),
)

TEMPLATE = """\
{% macro question(to) -%}
{% if chat -%}
chat = [{"role": "user", "content": "What is 3 plus 4?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="{{ to }}")
{%- else -%}
inputs = tokenizer("Once upon a time", return_tensors="{{ to }}")
{%- endif %}
{%- endmacro -%}
---
{{ card_data }}
---

# {{ name }}

{% if base_model %}[{{ base_model }}](https://huggingface.co/{{ base_model }}){% else %}An LFM2 checkpoint{% endif %}
for ONNX Runtime, written by `optimum-cli export lfm2` of optimum-lfm2.

## Files

{{ table }}

{{ measured }}

## Use it

With [Optimum](https://github.com/huggingface/optimum-onnx) and the package `optimum-lfm2`:

```python
import optimum_lfm2  # from here on ORTModelForCausalLM knows LFM2
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained("{{ name }}", subfolder="onnx", file_name="{{ file }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
{{ question("pt") }}
out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{% if genai -%}
With [ONNX Runtime GenAI](https://github.com/microsoft/onnxruntime-genai). It runs the graph that `decoder.filename` in
`genai_config.json` names. Its weights are those of the precision that a CPU runs fastest:

```python
{% if chat -%}
import json

{% endif -%}
import onnxruntime_genai as og
{{- download }}

folder = {{ folder }}
model = og.Model(folder)
tokenizer = og.Tokenizer(model)
{% if chat -%}
chat = [{"role": "user", "content": "What is 3 plus 4?"}]
prompt = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
{%- else -%}
prompt = "Once upon a time"
{%- endif %}
params = og.GeneratorParams(model)
params.set_search_options(max_length=128, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(prompt))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```
{% endif %}{% if dtype %}
With [Transformers.js](https://huggingface.co/docs/transformers.js) 4, in the browser or in node:

```js
import { pipeline } from "@huggingface/transformers";

const generator = await pipeline("text-generation", "{{ name }}", { dtype: "{{ dtype }}" });
{% if chat -%}
const chat = [{ role: "user", content: "What is 3 plus 4?" }];
const [{ generated_text }] = await generator(chat, { max_new_tokens: 64 });
console.log(generated_text.at(-1).content);
{%- else -%}
const [{ generated_text }] = await generator("Once upon a time", { max_new_tokens: 64 });
console.log(generated_text);
{%- endif %}
```
{% if unread %}
It cannot run {{ unread }}: their experts need onnxruntime 1.31, and Transformers.js 4.3 has 1.30.
{% endif %}{% endif %}
{% if unknown %}{{ unknown }} no {{ model_type }}, so these files do not run there as they are. The
changes that they need are in docs/{{ model_type }}.md of optimum-lfm2.

{% endif -%}
With `onnxruntime` alone. The caches start out empty, and each `present` output is the next call's `past` input.
`num_logits_to_keep` is the number of last tokens whose logits are computed; 0 means all of them:

```python
import numpy as np
import onnxruntime
{{- download }}
from transformers import AutoTokenizer

folder = {{ folder }}
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/onnx/{{ file }}")
pasts = [value for value in session.get_inputs() if value.name.startswith("past")]
kind = np.float16 if "float16" in pasts[0].type else np.float32
empty = {"batch_size": 1, "past_sequence_length": 0}
caches = [np.zeros([empty.get(axis, axis) for axis in past.shape], kind) for past in pasts]
{{ question("np") }}
ids, answer = inputs["input_ids"].astype(np.int64), []
length = ids.shape[1]
while len(answer) < 64:
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), "num_logits_to_keep": np.array(1)}
    feeds |= {past.name: cache for past, cache in zip(pasts, caches)}
    logits, *caches = session.run(None, feeds)
    token = int(logits[0, -1].argmax())
    if token == tokenizer.eos_token_id:
        break
    answer.append(token)
    ids, length = np.array([[token]]), length + 1
print(tokenizer.decode(answer))
```
"""


@dataclass(frozen=True)
class CardOptions:
    """What the user wants the card to say. None takes the value of the folder's older card or of the checkpoint's card.

    Attributes:
        repo_id: the id on the Hub that the examples load.
        base_model: the checkpoint's id on the Hub.
        license: the checkpoint's licence.
    """

    repo_id: str | None
    base_model: str | None
    license: str | None


def write_card(folder: Path, files: list[Published], old: Path, model: str, options: CardOptions, **hub: Any) -> None:
    """Write README.md, and copy the checkpoint's LICENSE.

    Args:
        folder: the folder to write to. It has the tokenizer.
        files: the ONNX files that the published folder will have.
        old: the published folder before this run.
        model: the checkpoint's folder, or its id on the Hub.
        options: what the user wants the card to say.
        hub: arguments of `transformers.utils.cached_file`, such as `cache_dir`.
    """
    before = _load(old / CARD)
    license_ = _checkpoint_file(model, LICENSE, hub)
    if license_ is not None and _is_of(license_, model):
        shutil.copyfile(license_, folder / LICENSE)
    data = _data(model, before, _load(_checkpoint_file(model, CARD, hub)), options)
    data.pipeline_tag = _task(folder)
    data.tags = _tags(_member(folder))
    if any(_javascript_reads(file, _member(folder)) for file in files):
        data.library_name = JAVASCRIPT  # the Hub shows how to load this layout under this library's name
        data.tags = [*data.tags, JAVASCRIPT]
    name = options.repo_id or _repo_id(before) or old.resolve().name
    values, template = _values(folder, files, name, data), TEMPLATE
    if _member(folder).text is not None:
        values |= vision_values(files, preferred(files))
        template = VISION_TEMPLATE
    if _member(folder).encodes:
        values, template = values | encoder_values(folder, _task(folder)), ENCODER_TEMPLATE
        if values["pooled"]:
            data.library_name, data.pipeline_tag = SENTENCE_TRANSFORMERS, "sentence-similarity"
            data.tags = [*data.tags, SENTENCE_TRANSFORMERS]
    ModelCard.from_template(data, template_str=template, **values).save(folder / CARD)


def _member(folder: Path) -> Member:
    return member_of(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")))


def _task(folder: Path) -> str:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return member_of(config).task(config.get("architectures"))


def _tags(member: Member) -> list[str]:
    return [member.model_type, *TAGS, *([GENAI] if member.genai_type else []), "optimum"]


def _javascript_reads(file: Published, member: Member) -> bool:
    """Return whether Transformers.js 4.3 can run the file.

    It knows only the Hub's cache names, and its onnxruntime is 1.30, whose `QMoE` does not round activations.
    """
    return member.transformers_js and file.cache_names == "hub" and not file.rounds_in_experts


def _load(path: Path | None) -> ModelCard | None:
    """Load a card. Return None where there is no card or it cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except ValueError:
        return None


def _checkpoint_file(model: str, name: str, hub: dict[str, Any]) -> Path | None:
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if path is None else Path(path)


def _is_of(path: Path, model: str) -> bool:
    """Return whether a checkpoint's file lies in its folder. A link out of a local folder may lead to private files."""
    if not Path(model).is_dir():
        return True
    folder, target = Path(model).resolve(), path.resolve()
    # The Hub's cache keeps a snapshot's files beside it, as links.
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return any(target.is_relative_to(place) for place in (folder, *blobs))


def _repo_id(card: ModelCard | None) -> str | None:
    """Return the heading of an earlier run's card if it is an id on the Hub."""
    found = re.search(r"^# ([\w.-]+/[\w.-]+)$", card.text, flags=re.MULTILINE) if card else None
    return found[1] if found else None


def _data(model: str, before: ModelCard | None, own: ModelCard | None, options: CardOptions) -> ModelCardData:
    """Collect the card's metadata. The user's word comes first, then the older card's, then the checkpoint's."""
    # The `base_model` of the checkpoint's card is left out. It names the model that the checkpoint was made of, and the
    # base model of this export is the checkpoint.
    sources = ((own, LICENSE_FIELDS), (before, (*LICENSE_FIELDS, "base_model")))
    fields = {name: value for card, names in sources if card for name in names if (value := card.data.get(name))}
    if not Path(model).is_dir():
        fields["base_model"] = model
    given = {"base_model": options.base_model, "license": options.license}
    fields |= {name: value for name, value in given.items() if value is not None}
    if "base_model" in fields:
        fields["base_model_relation"] = "quantized"  # the Hub calls every conversion so
    return ModelCardData(**fields)


def _values(folder: Path, files: list[Published], name: str, data: ModelCardData) -> dict[str, Any]:
    """Return the values that the template asks for."""
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    chosen = preferred(files, _member(folder).encodes)
    online = "/" in name  # an id on the Hub, not the name of a folder
    member = _member(folder)
    read = [file for file in files if _javascript_reads(file, member)]
    unknown = ["onnxruntime-genai 0.18"] * (member.genai_type is None) + ["Transformers.js 4.3.1"] * (
        not member.transformers_js
    )
    return {
        "name": name,
        "model_type": member.model_type,
        "genai": (folder / GENAI_CONFIG).is_file(),
        "unknown": f"{' and '.join(unknown)} {'have' if len(unknown) > 1 else 'has'}" if unknown else "",
        "base_model": data.base_model,
        "file": chosen.path.name,
        # The JavaScript example takes the same file if Transformers.js can run it, else the smallest one that it can.
        "dtype": (chosen if chosen in read else min(read, key=lambda file: file.size)).precision if read else None,
        "unread": " or ".join(file.precision for file in files if file not in read),
        "chat": "chat_template" in tokenizer,
        "folder": f'snapshot_download("{name}")' if online else f'"{name}"',
        "download": "\nfrom huggingface_hub import snapshot_download" if online else "",
        "table": file_table(files, COLUMNS),
        "measured": " ".join(_measured(files)),
    }


def _part(file: Published) -> str:
    names = {DECODER: "Each decoder", EMBEDDING: "Each embedding", VISION: "Each vision encoder"}
    return next((name for part, name in names.items() if file.path.name.startswith(part)), "Each file")


def _measured(files: list[Published]) -> Iterator[str]:
    """Yield sentences on how the table's figures were measured."""
    compared = {(_part(part), part.compared): None for file in files for part in file.all}
    yield from (f"{part} was {how}." for part, how in compared)
    yield from dict.fromkeys(file.quality.measured(file.text) for file in files if file.quality)

"""The model card of a published LFM2-VL: what `card.py` adds to its own values, and its template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optimum_lfm2.file_names import DECODER, EMBEDDING, VISION
from optimum_lfm2.publish.precisions import PRECISIONS, Published
from optimum_lfm2.publish.table import Column, file_table


TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{% if base_model %}[{{ base_model }}](https://huggingface.co/{{ base_model }}){% else %}An LFM2-VL checkpoint{% endif %}
for ONNX Runtime, written by `optimum-cli export lfm2` of optimum-lfm2. It takes pictures and text.

## Files

{{ table }}

A precision has three files, such as `onnx/{{ vision }}`, `onnx/{{ embedding }}` and `onnx/{{ file }}`. Pixels, features
and embeddings are float32 in all of them, so files of different precisions work together. Vision encoder and embedding
never have 4 bits: {{ in_8_bits }}.

{{ measured }}

## Use it

With [Optimum](https://github.com/huggingface/optimum-onnx), the package `optimum-lfm2`, pillow and torchvision:

```python
from optimum_lfm2 import ORTLfm2VlForConditionalGeneration
from transformers import AutoProcessor

model = ORTLfm2VlForConditionalGeneration.from_pretrained("{{ name }}", file_name="{{ file }}")
processor = AutoProcessor.from_pretrained("{{ name }}")

chat = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "picture.jpg"}, {"type": "text", "text": "What is in this picture?"}],
    }
]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{% if genai %}
With [ONNX Runtime GenAI](https://github.com/microsoft/onnxruntime-genai). It runs the files that `genai_config.json`
names, one prompt at a time. It shrinks a large picture where transformers cuts it into tiles:

```python
import json

import onnxruntime_genai as og
{{- download }}

folder = {{ folder }}
model = og.Model(folder)
processor, tokenizer = model.create_multimodal_processor(), og.Tokenizer(model)
chat = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]},
]
prompt = tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)
params = og.GeneratorParams(model)
params.set_search_options(max_length=512, do_sample=False)
generator = og.Generator(model, params)
generator.set_inputs(processor(prompt, images=og.Images.open("picture.jpg")))
stream = processor.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
```
{% endif %}{% if dtype %}
With [Transformers.js](https://huggingface.co/docs/transformers.js) 4, in the browser or in node. `dtype` may also be
chosen for each part, such as `{ {{ parts }} }`:

```js
import { AutoModelForImageTextToText, AutoProcessor, RawImage } from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{{ name }}");
const model = await AutoModelForImageTextToText.from_pretrained("{{ name }}", { dtype: "{{ dtype }}" });

const chat = [{ role: "user", content: [{ type: "image" }, { type: "text", text: "What is in this picture?" }] }];
const prompt = processor.apply_chat_template(chat, { add_generation_prompt: true });
const inputs = await processor(await RawImage.read("picture.jpg"), prompt, { add_special_tokens: false });
const output = await model.generate({ ...inputs, max_new_tokens: 64 });
const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0]);
```
{% endif %}
With `onnxruntime` alone, from what transformers' processor returns. The features take the places of the picture tokens
in order. The caches start out empty, and each `present` output is the next call's `past` input:

```python
import numpy as np
import onnxruntime
{{- download }}
from transformers import AutoConfig, AutoProcessor

folder = {{ folder }}
config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
vision, embedding, decoder = (
    onnxruntime.InferenceSession(f"{folder}/onnx/{name}")
    for name in ("{{ vision }}", "{{ embedding }}", "{{ file }}")
)
chat = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "picture.jpg"}, {"type": "text", "text": "What is in this picture?"}],
    }
]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
)
pictures = {value.name: inputs[value.name] for value in vision.get_inputs()}
pictures = {name: x.astype(np.float32 if name == "pixel_values" else np.int64) for name, x in pictures.items()}
(features,) = vision.run(None, pictures)
pasts = [value for value in decoder.get_inputs() if value.name.startswith("past")]
kind = np.float16 if "float16" in pasts[0].type else np.float32
empty = {"batch_size": 1, "past_sequence_length": 0}
caches = [np.zeros([empty.get(axis, axis) for axis in past.shape], kind) for past in pasts]
ids, answer = inputs["input_ids"].astype(np.int64), []
length = ids.shape[1]
while len(answer) < 64:
    (embeds,) = embedding.run(None, {"input_ids": ids})
    if not answer:
        embeds[ids == config.image_token_id] = features
    feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64)}
    feeds |= {"num_logits_to_keep": np.array(1)} | {past.name: cache for past, cache in zip(pasts, caches)}
    logits, *caches = decoder.run(None, feeds)
    token = int(logits[0, -1].argmax())
    if token == processor.tokenizer.eos_token_id:
        break
    answer.append(token)
    ids, length = np.array([[token]]), length + 1
print(processor.decode(answer))
```
"""


def _of(part: str) -> Column:
    """Return the column for the difference of a part's file from transformers."""

    def cell(file: Published) -> str:
        name = PRECISIONS[file.precision].named(part)
        return next(f"{one.difference:.2g}" for one in file.all if one.path.name == name)

    return "differs by", cell


COLUMNS: tuple[Column, ...] = (
    ("precision", lambda file: file.precision),
    ("suffix", lambda file: f"`{suffix}`" if (suffix := PRECISIONS[file.precision].suffix) else "none"),
    ("MB", lambda file: f"{file.size / 1e6:.4g}"),
    ("decoder", lambda file: PRECISIONS[file.precision].weights),
    _of(DECODER),
    ("vision encoder", lambda file: PRECISIONS[file.precision].vision),
    _of(VISION),
)


def vision_values(files: Sequence[Published], chosen: Published) -> dict[str, Any]:
    """Return the values that the template of LFM2-VL asks for, besides those of every card.

    Args:
        files: the precisions of the published folder.
        chosen: the one that the examples load.
    """
    own = PRECISIONS[chosen.precision]
    small = [PRECISIONS[file.precision] for file in files if file.precision in ("q4", "q4f16")]
    names = " and ".join(f"`{precision.named(part)}`" for precision in small for part in (VISION, EMBEDDING))
    best = next((file.precision for file in files if file.precision in ("fp16", "q8")), chosen.precision)
    dtypes = {VISION: best, EMBEDDING: chosen.precision, DECODER: chosen.precision}
    return {
        "table": file_table(files, COLUMNS),
        "vision": own.named(VISION),
        "embedding": own.named(EMBEDDING),
        "in_8_bits": f"{names} have 8" if small else "q4 gives them 8",
        "parts": ", ".join(f'{part}: "{dtype}"' for part, dtype in dtypes.items()),
    }

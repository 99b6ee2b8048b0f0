"""The model card of a published encoder: what `card.py` adds to its own values, and its template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimum_lfm2.loading.modules import MODULES


CLASSES = {
    "feature-extraction": ("ORTModelForFeatureExtraction", "last_hidden_state"),
    "fill-mask": ("ORTModelForMaskedLM", "logits"),
    "token-classification": ("ORTModelForTokenClassification", "logits"),
    "text-classification": ("ORTModelForSequenceClassification", "logits"),
}
POOLING = ".Pooling"

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{% if base_model %}[{{ base_model }}](https://huggingface.co/{{ base_model }})
{%- else %}An encoder made of LFM2{% endif %}
for ONNX Runtime, written by `optimum-cli export lfm2` of optimum-lfm2. The files need no code of the checkpoint's own.

## Files

{{ table }}

{{ measured }}

## Use it
{% if pooled %}
With [sentence-transformers](https://sbert.net):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{{ name }}", backend="onnx", model_kwargs={"file_name": "onnx/{{ file }}"})
vectors = model.encode(["Where is the silver key?", "Ben put the key next to the well."]{{ prompt }})
print(vectors.shape, model.similarity(vectors, vectors))
```
{% endif %}
With [Optimum](https://github.com/huggingface/optimum-onnx):

```python
from optimum.onnxruntime import {{ ort_class }}
from transformers import AutoTokenizer

model = {{ ort_class }}.from_pretrained("{{ name }}", subfolder="onnx", file_name="{{ file }}")
tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
inputs = tokenizer(["Where is the silver key?", "Ben put the key next to the well."], padding=True, return_tensors="pt")
print(model(**inputs).{{ output }}.shape)
```

On transformers 5, import `optimum_lfm2` first: optimum-onnx 0.1.0 does not admit that release.
{% if dtype %}
With [Transformers.js](https://huggingface.co/docs/transformers.js) 4, in the browser or in node:

```js
import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("{{ name }}");
const model = await AutoModel.from_pretrained("{{ name }}", { dtype: "{{ dtype }}" });
const inputs = tokenizer(["Where is the silver key?", "Ben put the key next to the well."], { padding: true });
const { {{ output }} } = await model(inputs);
console.log({{ output }}.dims);
```
{% endif %}"""


def encoder_values(folder: Path, task: str) -> dict[str, Any]:
    """Return the values that the template of an encoder asks for, besides those of every card.

    Args:
        folder: the published folder, with the files of sentence-transformers where the checkpoint has them.
        task: the task of the encoder's head.
    """
    ort_class, output = CLASSES[task]
    settings = folder / "config_sentence_transformers.json"
    prompts = json.loads(settings.read_text(encoding="utf-8")).get("prompts") if settings.is_file() else None
    prompt = next((name for name in ("document", "passage") if name in (prompts or {})), None)
    return {
        "ort_class": ort_class,
        "output": output,
        "pooled": any(str(module.get("type")).endswith(POOLING) for module in _modules(folder)),
        "prompt": f', prompt_name="{prompt}"' if prompt else "",
    }


def _modules(folder: Path) -> list[dict[str, Any]]:
    path = folder / MODULES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

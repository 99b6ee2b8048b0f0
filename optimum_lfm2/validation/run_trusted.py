"""Runs as a program of its own: a checkpoint's own code on rows of ids. `trusted.py` asks for it.

It imports nothing of this package, so that what the code does to transformers stays in this process.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import save_file


def main() -> None:
    request = json.load(sys.stdin)
    config = transformers.AutoConfig.from_pretrained(request["model"], trust_remote_code=True, **request["hub"])
    named = getattr(config, "auto_map", None) or {}
    names = [name for name in request["classes"] if name in named]
    if not names:
        raise SystemExit(f"auto_map in config.json names no {' or '.join(request['classes'])}.")
    model = getattr(transformers, names[0]).from_pretrained(
        request["model"], trust_remote_code=True, dtype=torch.float32, **request["hub"]
    )
    model.eval()
    results = {}
    with torch.no_grad():
        for index, row in enumerate(request["rows"]):
            ids = torch.tensor([row])
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            first = output[0] if not torch.is_tensor(output) else output
            results[str(index)] = first[0].float().contiguous()
    save_file(results, request["results"])


if __name__ == "__main__":
    main()

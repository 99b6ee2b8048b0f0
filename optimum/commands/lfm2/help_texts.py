"""What `--help` says of LFM2's options of `optimum-cli export onnx`. Every start of `optimum-cli` imports this.

The options themselves are in `optimum_lfm2`, which is heavy. A test compares the names here with those there.
"""

from __future__ import annotations

from optimum.commands.lfm2.model_types import MODEL_TYPES


VARIANTS = {
    "default": "as the checkpoint has them: in float, as --dtype says (fp32 or fp16), or the codes of a GGUF file",
    "q8": "weights in 8 bits, next to indistinguishable from float",
    "q4": "weights in 4 bits, embedding and head in 8; with --dtype fp16 for devices that compute in half precision",
    "q4s": "embedding and head in 4 bits too: smaller and faster, with twice the divergence",
    "float": "weights in float, also those that a GGUF file has in codes",
}
# The first value of each option is its default.
MODEL_KWARGS = {
    "cache_names": (("hub", "genai"), "names of the caches: as on the Hub, or as onnxruntime-genai's builder writes"),
    "embedding": (
        ("fused", "portable", "float"),
        "how a quantised graph reads the embedding: by one operator, by those that browsers have, or unquantised",
    ),
    "num_logits_to_keep": (
        ("optional", "required"),
        "whether this graph input has the default 0, all logits; Transformers.js wants required",
    ),
    "sliding_cache": (("window", "growing"), "what LFM3's sliding layers keep: the window that they see, or all"),
    "rollback": (("replay", "columns"), "how tokens are taken back: by running some again, or by outputs of their own"),
}

# One paragraph in the help that all models share. It changes nothing else for others.
ONNX_EPILOG = (
    f"Models of the types {', '.join(name for name in MODEL_TYPES if '-' not in name)} are exported by optimum-lfm2: "
    "`optimum-cli lfm2 --help` says what --variant and --model-kwargs take for them."
)


def _variants() -> str:
    return "\n".join(f"    {name:<9}{text}" for name, text in VARIANTS.items())


def _model_kwargs() -> str:
    return "\n".join(
        f'    "{name}": {" or ".join(f"{chr(34)}{value}{chr(34)}" for value in values)}\n        {text}'
        for name, (values, text) in MODEL_KWARGS.items()
    )


TOOLS_DESCRIPTION = f"""\
Tools for exported LFM2 models. These commands export them:

  optimum-cli export onnx --model MODEL OUT    one precision; Optimum's own command, with the options below
  optimum-cli export lfm2 --model MODEL OUT    several precisions for the Hub, each checked, with a model card

what export onnx takes for LFM2, besides --dtype, --task and the other options of its own help:

  --variant NAME
{_variants()}

  --model-kwargs JSON, an object with any of these; the first value is the default
{_model_kwargs()}
"""
TOOLS_EPILOG = """\
docs: README.md and docs/ of optimum-lfm2. For a bug report: python -m optimum_lfm2"""

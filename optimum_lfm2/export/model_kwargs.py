"""The options of an LFM2 export that Optimum does not know. `--model-kwargs` carries them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimum_lfm2.caches import CACHE_NAMES
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.weights.blocks import EMBEDDINGS


# The values that each option can have.
VALUES: dict[str, tuple[str, ...]] = {
    "embedding": EMBEDDINGS,
    "cache_names": CACHE_NAMES,
    "num_logits_to_keep": ("optional", "required"),
    "sliding_cache": ("window", "growing"),
    "rollback": ("replay", "columns"),
}


@dataclass(frozen=True)
class ExportOptions:
    """What `--model-kwargs` says.

    Attributes:
        embedding: how a quantised graph reads the embedding, one of `EMBEDDINGS`.
        cache_names: the naming convention of the caches, one of `CACHE_NAMES`.
        num_logits_to_keep: `optional` gives this graph input the default 0, `required` gives it none.
        sliding_cache: what layers of sliding attention keep. `window` is the tokens that they see, `growing` is all.
        rollback: how our runtime takes tokens back. With `replay` it runs those tokens of the last call again that
            stay. `columns` adds an output for each state, with the columns that a call adds to it. Then no token is run
            again.
    """

    embedding: str = "fused"
    cache_names: str = "hub"
    num_logits_to_keep: str = "optional"
    sliding_cache: str = "window"
    rollback: str = "replay"

    @classmethod
    def read(cls, model_kwargs: Any, quantized: bool, names: Sequence[str] | None = None) -> ExportOptions:
        """Read the options. Those that are left out have their defaults.

        Args:
            model_kwargs: the parsed JSON of `--model-kwargs`, or None.
            quantized: whether the weights are quantised.
            names: the options that have an effect on the model (`Member.options`). None means all.

        Raises:
            Lfm2Error: `model_kwargs` is no object, names an unknown option, gives an option an unknown value, or gives
                an option that has no effect.
        """
        given = {} if model_kwargs is None else model_kwargs
        options = {name: values for name, values in VALUES.items() if names is None or name in names}
        listed = ", ".join(f"{name} ({', '.join(values)})" for name, values in options.items())
        known = f"This model knows {listed}."
        if not isinstance(given, Mapping):
            raise Lfm2Error(f"--model-kwargs {given}: give a JSON object. {known}")
        if unknown := sorted(map(str, given.keys() - options.keys())):
            raise Lfm2Error(f"--model-kwargs: nothing knows {', '.join(unknown)}. {known}")
        for name, value in given.items():
            if value not in VALUES[name]:
                raise Lfm2Error(f"--model-kwargs: {name} is {json.dumps(value, default=str)}. {known}")
        if "embedding" in given and not quantized:
            raise Lfm2Error(
                "--model-kwargs: embedding says how a quantised graph reads its embedding, and this export is not "
                "quantised. Leave it out, or give a --variant that quantises."
            )
        return cls(**given)

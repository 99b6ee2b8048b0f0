"""The options of an LFM2 export that Optimum does not know. `--model-kwargs` carries them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimum_lfm2.caches import CACHE_NAMES
from optimum_lfm2.errors import Lfm2Error
from optimum_lfm2.weights.blocks import EMBEDDINGS


# The values that each option can have.
VALUES: dict[str, tuple[str, ...]] = {
    "embedding": EMBEDDINGS,
    "cache_names": tuple(CACHE_NAMES),
    "num_logits_to_keep": ("optional", "required"),
}
OF_ENCODERS = ("embedding",)


@dataclass(frozen=True)
class ExportOptions:
    """What `--model-kwargs` says.

    Attributes:
        embedding: how a quantised graph reads the embedding, one of `EMBEDDINGS`.
        cache_names: the naming convention of the caches, a key of `CACHE_NAMES`.
        num_logits_to_keep: `optional` gives this graph input the default 0, `required` gives it none.
    """

    embedding: str = "fused"
    cache_names: str = "hub"
    num_logits_to_keep: str = "optional"

    @classmethod
    def read(cls, model_kwargs: Any, encodes: bool = False) -> ExportOptions:
        """Read the options. Those that are left out have their defaults.

        Args:
            model_kwargs: the parsed JSON of `--model-kwargs`, or None.
            encodes: whether they are for an encoder, which has no caches and gives all logits.

        Raises:
            Lfm2Error: it is no object, names an unknown option, or gives an option an unknown value.
        """
        given = {} if model_kwargs is None else model_kwargs
        options = {name: values for name, values in VALUES.items() if name in OF_ENCODERS or not encodes}
        listed = ", ".join(f"{name} ({', '.join(values)})" for name, values in options.items())
        known = f"{'An encoder' if encodes else 'LFM2'} knows {listed}."
        if not isinstance(given, Mapping):
            raise Lfm2Error(f"--model-kwargs {given}: give a JSON object. {known}")
        if unknown := sorted(map(str, given.keys() - options.keys())):
            raise Lfm2Error(f"--model-kwargs: nothing knows {', '.join(unknown)}. {known}")
        for name, value in given.items():
            if value not in VALUES[name]:
                raise Lfm2Error(f"--model-kwargs: {name} is {json.dumps(value, default=str)}. {known}")
        return cls(**given)

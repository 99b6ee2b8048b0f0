"""What validation asks of the configuration of an export. `configs.py` has the class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from optimum_lfm2.caches import CacheTensor
from optimum_lfm2.graph.member import Member
from optimum_lfm2.weights.blocks import Scheme


class ExportConfig(Protocol):
    """An `OnnxConfig` of ours, whose file is to be compared.

    Attributes:
        TOKENS: the input that says what the tokens are.
        ATOL_FOR_VALIDATION: the largest relative error of a token.
        task: the task of the graph, without past.
        float_dtype: `fp32` or `fp16`.
        use_past, use_past_in_inputs: whether the graph gives and takes caches.
    """

    TOKENS: str
    task: str
    float_dtype: str
    use_past: bool
    use_past_in_inputs: bool

    @property
    def ATOL_FOR_VALIDATION(self) -> float: ...  # noqa: N802

    @property
    def member(self) -> Member: ...

    @property
    def scheme(self) -> Scheme | None: ...

    @property
    def weights(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def cache_tensors(self) -> list[CacheTensor]: ...

    @property
    def inputs(self) -> dict[str, dict[int, str]]: ...

    @property
    def outputs(self) -> dict[str, dict[int, str]]: ...

    def output_shapes(self) -> dict[str, tuple[int | str, ...] | None]: ...

    def validation_inputs(self, shapes: Mapping[str, int]) -> list[dict[str, Any]]: ...

    def flatten_output_collection_property(self, name: str, field: Iterable[Any]) -> dict[str, Any]: ...

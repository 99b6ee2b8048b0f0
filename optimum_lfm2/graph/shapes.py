"""What the graph only moves: shapes, parts, columns. Each function is one ONNX node (or a few), as in `ops.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from optimum_lfm2.graph.tracing import Node, constant, typed


class _RowShape(Node):
    @staticmethod
    def forward(ctx, ids):
        return torch.tensor([*ids.shape[:2], -1])

    @staticmethod
    @typed(1, dtype=torch.int64)
    def symbolic(g, ids):
        return g.op("Concat", g.op("Shape", ids, end_i=2), constant(g, [-1]), axis_i=0)


def row_shape(ids: torch.Tensor) -> torch.Tensor:
    """The shape (batch_size, sequence_length, -1) as a tensor, of anything with these two axes first."""
    return _RowShape.apply(ids)


class _Rows(Node):
    @staticmethod
    def forward(ctx, x, shape):
        return x.reshape(*shape.tolist())

    @staticmethod
    @typed(3)
    def symbolic(g, x, shape):
        return g.op("Reshape", x, shape)


def rows(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Anything with batch_size * sequence_length * width elements → (batch_size, sequence_length, width)."""
    return _Rows.apply(x, shape)


class _Flat(Node):
    @staticmethod
    def forward(ctx, x, width):
        return x.reshape(-1, width)

    @staticmethod
    @typed(2)
    def symbolic(g, x, width):
        return g.op("Reshape", x, constant(g, [-1, width]))


def flat(x: torch.Tensor, width: int) -> torch.Tensor:
    """Anything whose elements come in runs of `width` → (runs, width)."""
    return _Flat.apply(x, width)


class _Resized(Node):
    @staticmethod
    def forward(ctx, x, sizes):
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])

    @staticmethod
    def symbolic(g, x, sizes):
        return typed(len(sizes))(lambda g, x: g.op("Reshape", x, constant(g, list(sizes))))(g, x)


def resized(x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """The same values in other sizes, as ONNX writes them: 0 keeps an axis, -1 takes what is left."""
    return _Resized.apply(x, sizes)


class _Batched(Node):
    @staticmethod
    def forward(ctx, x, ids):
        return x.reshape(ids.shape[0], -1, x.shape[1])

    @staticmethod
    @typed(3)
    def symbolic(g, x, ids):
        batch = g.op("Shape", ids, end_i=1)
        width = g.op("Shape", x, start_i=1)
        return g.op("Reshape", x, g.op("Concat", batch, constant(g, [-1]), width, axis_i=0))


def batched(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(batch_size * any, width) → (batch_size, any, width)."""
    return _Batched.apply(x, ids)


class _Split(Node):
    @staticmethod
    def forward(ctx, x, width):
        return tuple(part.contiguous() for part in x.split(width, dim=-1))

    @staticmethod
    @typed(2, 2, 2)
    def symbolic(g, x, width):
        return tuple(g.op("Split", x, constant(g, [width] * 3), axis_i=-1, outputs=3))


def split_in_three(x: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """(tokens, 3 * width) → three of (tokens, width)."""
    return _Split.apply(x, width)


class _Pad(Node):
    @staticmethod
    def forward(ctx, x, axis, before, after):
        widths = [0, 0] * (x.dim() - 1 - axis) + [before, after]
        return F.pad(x, widths)

    @staticmethod
    def symbolic(g, x, axis, before, after):
        rank = x.type().dim()
        pads = [0] * (2 * rank)
        pads[axis], pads[rank + axis] = before, after
        return typed(rank)(lambda g, x: g.op("Pad", x, constant(g, pads)))(g, x)


def pad(x: torch.Tensor, axis: int, before: int = 0, after: int = 0) -> torch.Tensor:
    """Zeros before and after the values of one axis, counted from the first."""
    return _Pad.apply(x, axis, before, after)


class _Lengths(Node):
    @staticmethod
    def forward(ctx, mask):
        batch, total = mask.shape
        return torch.full((batch,), total - 1, dtype=torch.int32), torch.full((), total, dtype=torch.int32)

    @staticmethod
    @typed(1, 0, dtype=torch.int32)
    def symbolic(g, mask):
        total = g.op("Cast", g.op("Shape", mask, start_i=1), to_i=6)
        last = g.op("Sub", total, g.op("Constant", value_t=torch.tensor([1], dtype=torch.int32)))
        return (
            g.op("Expand", last, g.op("Shape", mask, end_i=1)),
            g.op("Squeeze", total, constant(g, [0])),
        )


def lengths(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a mask (batch_size, total): total - 1 for each row, int32, and total as an int32 scalar."""
    return _Lengths.apply(mask)


class _LastTokens(Node):
    @staticmethod
    def forward(ctx, x, count):
        keep = int(count.reshape(()))
        return x[:, -keep:].contiguous()

    @staticmethod
    @typed(3)
    def symbolic(g, x, count):
        start = g.op("Neg", g.op("Reshape", count, constant(g, [1])))
        return g.op("Slice", x, start, constant(g, [torch.iinfo(torch.int64).max]), constant(g, [1]))


def last_tokens(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The last `count` tokens of rows; all of them where `count` is 0 or more than there are.

    `count` is an int64 scalar or a vector of one element.
    """
    return _LastTokens.apply(x, count)


class _Windows(Node):
    @staticmethod
    def forward(ctx, columns, index):
        return columns[:, index]

    @staticmethod
    @typed(4)
    def symbolic(g, columns, index):
        return g.op("Gather", columns, index, axis_i=1)


def windows(columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch_size, columns, width), int64 (windows, taps) → (batch_size, windows, taps, width)."""
    return _Windows.apply(columns, index)


class _ColumnsAt(Node):
    @staticmethod
    def forward(ctx, columns, end, count):
        index = end + torch.arange(count)
        return columns.gather(1, index.unsqueeze(2).expand(-1, -1, columns.shape[2])).transpose(1, 2).contiguous()

    @staticmethod
    @typed(3)
    def symbolic(g, columns, end, count):
        index = g.op("Add", end, constant(g, list(range(count))))
        picked = g.op("GatherND", columns, g.op("Unsqueeze", index, constant(g, [2])), batch_dims_i=1)
        return g.op("Transpose", picked, perm_i=[0, 2, 1])


def columns_at(columns: torch.Tensor, end: torch.Tensor, count: int) -> torch.Tensor:
    """`count` columns of each row from its own `end` on.

    (batch_size, columns, width), int64 (batch_size, 1) → (batch_size, width, count).
    """
    return _ColumnsAt.apply(columns, end, count)


class _Gathered(Node):
    @staticmethod
    def forward(ctx, x, index):
        return x.gather(2, index.expand(-1, -1, -1, x.shape[3]))

    @staticmethod
    @typed(4)
    def symbolic(g, x, index):
        return g.op("GatherND", x, index, batch_dims_i=2)


def gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Columns of each row and head.

    (batch_size, heads, columns, width), int64 (batch_size, heads, count, 1) → (batch_size, heads, count, width).
    """
    return _Gathered.apply(x, index)

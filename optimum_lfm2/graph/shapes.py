"""Operators that only move values. Each function becomes one ONNX node, or a few, as in `ops.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from optimum_lfm2.graph.tracing import Node, constant, typed


class _Resized(Node):
    @staticmethod
    def forward(ctx, x, sizes):
        return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)])

    @staticmethod
    def symbolic(g, x, sizes):
        return typed(len(sizes))(lambda g, x: g.op("Reshape", x, constant(g, list(sizes))))(g, x)


def resized(x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Reshape. The sizes are written as ONNX has them: 0 keeps an axis, and -1 takes the values that are left."""
    return _Resized.apply(x, sizes)


class _SizedLike(Node):
    @staticmethod
    def forward(ctx, x, like):
        return x.reshape(like.shape)

    @staticmethod
    def symbolic(g, x, like):
        return typed(like.type().dim())(lambda g, x: g.op("Reshape", x, g.op("Shape", like)))(g, x)


def sized_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape to the shape of another tensor."""
    return _SizedLike.apply(x, like)


class _Named(Node):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @typed(None)
    def symbolic(g, x):
        return g.op("Identity", x)


def named(x: torch.Tensor) -> torch.Tensor:
    """Return the same values as a value of their own. An output of the graph then has a name of its own."""
    return _Named.apply(x)


class _Parts(Node):
    @staticmethod
    def forward(ctx, x, widths):
        return tuple(part.contiguous() for part in x.split(list(widths), dim=-1))

    @staticmethod
    def symbolic(g, x, widths):
        def split(g, x):
            return tuple(g.op("Split", x, constant(g, list(widths)), axis_i=-1, outputs=len(widths)))

        return typed(*[None] * len(widths))(split)(g, x)


def parts(x: torch.Tensor, *widths: int) -> tuple[torch.Tensor, ...]:
    """Split the last axis: (..., width) → (..., widths[i]) each."""
    return _Parts.apply(x, widths)


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
    """Add zeros before and after the values of one axis. Axes are counted from the first one."""
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
    """Read the width of a mask, (batch_size, total).

    Return total - 1 for each row, int32 (batch_size), and total, an int32 scalar.
    """
    return _Lengths.apply(mask)


class _Last(Node):
    @staticmethod
    def forward(ctx, x, like):
        return x[:, -like.shape[1] :].contiguous()

    @staticmethod
    @typed(None)
    def symbolic(g, x, like):
        start = g.op("Neg", g.op("Shape", like, start_i=1, end_i=2))
        return g.op("Slice", x, start, constant(g, [torch.iinfo(torch.int64).max]), constant(g, [1]))


def last(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Take each row's last columns, as many as `like` has: (batch_size, any, ...), (batch_size, columns, ...)."""
    return _Last.apply(x, like)


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
    """Take the last tokens of rows: (batch_size, tokens, width) → (batch_size, min(count, tokens), width).

    `count` is an int64 scalar or a vector of one element. 0 means all.
    """
    return _LastTokens.apply(x, count)


class _Numbered(Node):
    @staticmethod
    def forward(ctx, x):
        return torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2])

    @staticmethod
    @typed(2)
    def symbolic(g, x):
        count = g.op("Range", constant(g, 0), g.op("Size", x), constant(g, 1))
        return g.op("Reshape", count, g.op("Shape", x))


def numbered(x: torch.Tensor) -> torch.Tensor:
    """Number the tokens of a call from 0, row by row: int64 of the shape of `x`, (batch_size, sequence_length)."""
    return _Numbered.apply(x)


class _Counted(Node):
    @staticmethod
    def forward(ctx, x):
        return torch.arange(1, x.shape[1] + 1)

    @staticmethod
    @typed(1, dtype=torch.int64)
    def symbolic(g, x):
        columns = g.op("Gather", g.op("Shape", x), constant(g, 1))
        return g.op("Range", constant(g, 1), g.op("Add", columns, constant(g, 1)), constant(g, 1))


def counted(x: torch.Tensor) -> torch.Tensor:
    """Return 1 to the number of columns of `x`, (batch_size, columns, ...), as int64 (columns)."""
    return _Counted.apply(x)


class _Repeated(Node):
    @staticmethod
    def forward(ctx, x, like):
        return x[:, None, None].expand(-1, -1, like.shape[1], -1)

    @staticmethod
    @typed(4)
    def symbolic(g, x, like):
        sequence = g.op("Shape", like, start_i=1, end_i=2)
        shape = g.op("Concat", constant(g, [1, 1]), sequence, constant(g, [1]), axis_i=0)
        return g.op("Expand", g.op("Unsqueeze", x, constant(g, [1, 2])), shape)


def repeated(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Repeat a row's values for each of its tokens: (batch_size, any) → (batch_size, 1, columns of `like`, any)."""
    return _Repeated.apply(x, like)


class _ColumnsAt(Node):
    @staticmethod
    def forward(ctx, columns, index):
        return columns.gather(1, index.expand(-1, -1, columns.shape[2])).transpose(1, 2).contiguous()

    @staticmethod
    @typed(3)
    def symbolic(g, columns, index):
        return g.op("Transpose", g.op("GatherND", columns, index, batch_dims_i=1), perm_i=[0, 2, 1])


def columns_at(columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take columns by row: (batch_size, columns, width), int64 (batch_size, count, 1) → (batch_size, width, count)."""
    return _ColumnsAt.apply(columns, index)


class _Gathered(Node):
    @staticmethod
    def forward(ctx, x, index):
        return x.gather(2, index.expand(-1, -1, -1, x.shape[3]))

    @staticmethod
    @typed(4)
    def symbolic(g, x, index):
        return g.op("GatherND", x, index, batch_dims_i=2)


def gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take columns by row and head.

    (batch_size, heads, columns, width), int64 (batch_size, heads, count, 1) → (batch_size, heads, count, width).
    """
    return _Gathered.apply(x, index)


class _Picked(Node):
    @staticmethod
    def forward(ctx, x, index, axis):
        return x[(slice(None),) * axis + (index,)]

    @staticmethod
    def symbolic(g, x, index, axis):
        rank = x.type().dim() + index.type().dim() - 1
        return typed(rank)(lambda g, x: g.op("Gather", x, index, axis_i=axis))(g, x)


def picked(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    """Take entries of one axis, the same ones for every row. The axes of `index`, int64, replace that axis."""
    return _Picked.apply(x, index, axis)


class _Blocks(Node):
    @staticmethod
    def forward(ctx, columns, longest):
        block = min(len(columns), longest)
        count = -(-len(columns) // block)
        return torch.arange(count * block).reshape(count, block)

    @staticmethod
    @typed(2)
    def symbolic(g, columns, longest):
        length, one = g.op("Shape", columns), constant(g, [1])
        block = g.op("Min", length, constant(g, [longest]))
        count = g.op("Div", g.op("Sub", g.op("Add", length, block), one), block)
        end = g.op("Squeeze", g.op("Mul", count, block))
        numbers = g.op("Range", constant(g, 0), end, constant(g, 1))
        return g.op("Reshape", numbers, g.op("Concat", count, block, axis_i=0))


def blocks(columns: torch.Tensor, longest: int) -> torch.Tensor:
    """Cut columns, counted from 0, into blocks of equal length: int64 (length) → int64 (blocks, block).

    A block has min(length, longest) columns. The last block may count beyond the last column.
    """
    return _Blocks.apply(columns, longest)

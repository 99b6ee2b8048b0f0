"""The table of a model card: a row for each precision of the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from optimum_lfm2.publish.precisions import Published


# A column's title, and its cell for a precision.
Column = tuple[str, Callable[[Published], str]]


def file_table(files: Sequence[Published], columns: Sequence[Column]) -> str:
    """Return the table in Markdown. Columns on quality follow where some file has been measured."""
    measured = next((list(file.quality.cells()) for file in files if file.quality), [])
    titles = [title for title, _ in columns] + measured
    rows = [titles, ["---"] * len(titles)]
    for file in files:
        figures = file.quality.cells() if file.quality else {}
        rows.append([cell(file) for _, cell in columns] + [figures.get(title, "") for title in measured])
    return "\n".join(map(_row, rows))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"

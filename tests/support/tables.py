"""Tables that benchmarks print."""

from __future__ import annotations


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

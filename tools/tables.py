"""Aligned text tables of the command's output."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as text: the first column to the left, the others to the right.

    Args:
        header: a title a column.
        rows: as many cells a row; a row without cells becomes a rule.
    """
    widths = [max(len(row[i]) for row in [header, *rows] if row) for i in range(len(header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        if row
        else rule
        for row in [header, (), *rows]
    ]
    return "\n".join(lines)

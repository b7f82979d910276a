"""Tables in documents: what stands between two markers is written by a script alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rapm.io import write_text

END = "<!-- end of table -->"


def replace_between(file: Path, start: str, text: str) -> None:
    """Puts text between the marker ``start`` and the next :data:`END`.

    Raises:
        SystemExit: they are missing.
    """
    whole = file.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(whole):
        sys.exit(f"{file} has lost its markers {start} ... {END}")
    write_text(file, pattern.sub(lambda _: f"{start}\n{text}\n{END}", whole, count=1))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Files of records, a line of JSON each: one for every iteration, or for every time of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rapm.errors import UserError
from rapm.io import NoFile, append_line, read, write_text


def append_record(file: Path, record: Mapping[str, Any]) -> None:
    append_line(file, json.dumps(record))


def read_records(file: Path) -> list[dict[str, Any]]:
    """All of a file, [] where there is none. Their ``iteration`` rises.

    Raises:
        UserError: a line is no record.
    """
    try:
        lines = read(file).split(b"\n")[:-1]  # a kill may have cut the last line
    except NoFile:
        return []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["iteration"] <= (records[-1]["iteration"] if records else -1):
                raise ValueError
            records.append(record)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(
                f"{file} is damaged: line {number} is no record of an iteration after those "
                "before it; delete that line, or the file: nothing is computed from it"
            ) from None
    return records


def forget_from(file: Path, iteration: int) -> None:
    """Drops the records of an iteration and of all after it."""
    kept = [json.dumps(r) + "\n" for r in read_records(file) if r["iteration"] < iteration]
    if kept or file.is_file():
        write_text(file, "".join(kept))

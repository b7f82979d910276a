"""The files and data sets that prompts are read from, row by row."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rapm.errors import UserError, first_line
from rapm.io import read

COLUMNS = ("prompt", "caption", "text")  # the first of them that is there


@dataclass(frozen=True)
class Row:
    """What a source holds in one place: ``where`` names it in errors, ``name`` is the text's
    column."""

    where: str
    name: str
    text: object
    seed: object = None


@dataclass(frozen=True)
class _Columns:
    """The names of the text's column and of the seed's, if there is one, as the source writes
    them."""

    text: str
    seed: str | None

    def named(self) -> list[str]:
        return [self.text, self.seed] if self.seed else [self.text]


def _columns(where: str, names: Sequence[str]) -> _Columns:
    """
    Raises:
        UserError: no column has a prompt's name, or two have the same.
    """
    known = {name.strip().lower(): name for name in reversed(names)}
    text = next((known[column] for column in COLUMNS if column in known), None)
    if text is None:
        there = ", ".join(names) or "none"
        raise UserError(
            f"{where}: no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; there are: {there}"
        )
    columns = _Columns(text, known.get("seed"))
    for name in columns.named():  # one of two would be taken in silence
        if sum(name.strip().lower() == other.strip().lower() for other in names) > 1:
            raise UserError(f"{where}: column {name} is there twice; keep one of them")
    return columns


def _row(where: str, record: Mapping[str, Any], columns: _Columns) -> Row:
    return Row(
        where, columns.text, record[columns.text], record[columns.seed] if columns.seed else None
    )


# ---- text files


def read_text(file: Path) -> str:
    data = read(file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file} line {line}: this is not UTF-8 text") from None


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Where a line is, and the line; blank ones are passed over."""
    for number, line in enumerate(io.StringIO(read_text(file), newline=None), start=1):
        if line.strip():
            yield f"{file} line {number}", line


def _txt_rows(file: Path) -> Iterator[Row]:
    for where, line in _lines(file):
        yield Row(where, "prompt", line)


def _jsonl_rows(file: Path) -> Iterator[Row]:
    for where, line in _lines(file):
        try:
            value = json.loads(line, object_pairs_hook=_once)
        except RecursionError:
            raise UserError(f"{where}: this is not JSON (nested too deeply)") from None
        except ValueError as error:
            raise UserError(
                f"{where}: this is not JSON ({str(error).split(': line')[0]})"
            ) from None
        if isinstance(value, str):
            yield Row(where, "prompt", value)
        elif isinstance(value, Mapping):
            yield _row(where, value, _columns(where, list(value)))
        else:
            raise UserError(f"{where}: this is neither an object nor a string")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which Python would read with the last of two equal names."""
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"'{twice}' is there twice")
    return dict(pairs)


def _cells(file: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """Where a row begins, and its cells. Strict: a quote that is never closed would quietly cost
    the rest of the file."""
    reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield f"{file} line {line}", cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file} line {line}: this row cannot be read ({error})") from None


def _table_rows(file: Path) -> Iterator[Row]:
    delimiter, name = ("\t", "tab") if file.suffix.lower() == ".tsv" else (",", "comma")
    rows = _cells(file, delimiter)
    where, header = next(rows, ("", []))
    if not header:
        return
    columns = _columns(where, header)
    for where, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{where}: cells and columns differ in number ({len(cells)} and {len(header)}); "
                f"a prompt with a {name} in it needs quotes"
            )
        yield _row(where, dict(zip(header, cells, strict=True)), columns)


# ----
# with the package's extras


def _needed(module: str, source: object) -> Any:
    """
    Raises:
        UserError: the module is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"{source} needs {package} to be read; install it: pip install 'rapm[data]'"
        ) from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    parquet = _needed("pyarrow.parquet", file)
    arrow = _needed("pyarrow", file)
    try:
        with parquet.ParquetFile(file) as table:
            columns = _columns(str(file), table.schema_arrow.names)
            records = (
                record
                for batch in table.iter_batches(columns=columns.named())
                for record in batch.to_pylist()
            )
            for number, record in enumerate(records, start=1):
                yield _row(f"{file} row {number}", record, columns)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {first_line(error)}") from None


_HUB_NAME = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@:]+))?(:(?P<split>.+))?", re.ASCII
)


def hub_rows(source: str) -> Iterator[Row]:
    """By ``datasets`` from 4.0 on alone, which runs no code out of a data set; older ones may."""
    match = _HUB_NAME.fullmatch(source)
    if not match:
        raise UserError(
            f"{source}: a hub data set is written hub:OWNER/NAME, hub:OWNER/NAME@REVISION or "
            f"hub:OWNER/NAME:SPLIT"
        )
    datasets = _needed("datasets", source)
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(
            f"{source} needs datasets 4.0 or newer, not {datasets.__version__}; install it: pip "
            f"install 'rapm[data]'"
        )
    try:
        table = datasets.load_dataset(
            match["name"], revision=match["revision"], split=match["split"] or "train"
        )
    except (
        Exception
    ) as error:  # of the hub, the network or a damaged file: they have no base in common
        raise UserError(f"{source} cannot be loaded: {first_line(error)}") from None
    columns = _columns(source, table.column_names)
    for number, record in enumerate(table.select_columns(columns.named()), start=1):
        yield _row(f"{source} row {number}", record, columns)


READERS = {
    ".txt": _txt_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}

"""Others' names and texts made safe to show: one place for the terminal, one for Markdown."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any


def one_line(text: str) -> str:
    """With whatever would move a cursor, break a line or turn the direction of writing escaped, as
    TOML and JSON write it too."""
    # Control, format, lone surrogate, separator of lines and of paragraphs.
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(_escaped(c) if unicodedata.category(c) in hidden else c for c in text)


def _escaped(letter: str) -> str:
    number = ord(letter)
    plain = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return plain.get(letter) or (f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}")


def is_unicode(text: str) -> bool:
    """Whether it can be written; what was no UTF-8 on a command line or in JSON cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def code_span(text: str) -> str:
    """As code within a Markdown line: nothing in it is HTML or Markdown."""
    text = one_line(text)
    fence = "`" * (_longest_fence(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def code_cell(text: str) -> str:
    """As code within a table's cell, where a bar would begin the next one."""
    return code_span(text).replace("|", "\\|")


def code_block(text: str, language: str) -> str:
    """As a block of code in Markdown; lines stay lines."""
    fence = "`" * max(3, _longest_fence(text) + 1)
    lines = "\n".join(map(one_line, text.rstrip("\n").split("\n")))
    return f"{fence}{language}\n{lines}\n{fence}"


def _longest_fence(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


class _Output:
    """A stream that a command's work does not depend on.

    Letters that its encoding lacks are escaped. When nobody reads it any more, or its disk is full,
    what is written goes nowhere.
    """

    def __init__(self, stream: Any, *, escaped: bool) -> None:
        self._stream, self._escaped = stream, escaped
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        shown = "\n".join(map(one_line, text.split("\n"))) if self._escaped else text
        self._try(lambda: self._stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, what: Callable[[], object]) -> None:
        try:
            what()
        except OSError as error:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            if not isinstance(error, BrokenPipeError):
                print(f"rapm: the output could not be written: {error}", file=sys.stderr)


@contextmanager
def output() -> Iterator[None]:
    """Makes what a command prints safe to show and free to fail, while it runs."""
    for name in ("stdout", "stderr"):  # closed by whoever started this, cron for one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (as long as the program)
    # Progress bars move the cursor of the error stream.
    out, err = _Output(sys.stdout, escaped=True), _Output(sys.stderr, escaped=False)
    with redirect_stdout(out), redirect_stderr(err):  # type: ignore[type-var]
        try:
            yield
        finally:
            out.flush()
            err.flush()

"""Files of others, opened with care: regular ones of a sensible size, and whatever fails in reading
them is one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rapm.errors import UserError, first_line
from rapm.memory import is_out_of_memory

TEXT_BYTES = 64 << 20  # of a config, an index, a vocabulary; real ones have a few megabytes
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@contextmanager
def reading(source: str, part: str) -> Iterator[None]:
    """Around others' code that reads others' files: whatever fails in it is one line.

    Raises:
        UserError: names the part.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # for who knows what would lower it
            raise
        told = first_line(error)
        kind = f"{type(error).__name__} " if isinstance(error, KeyError) else ""
        raise UserError(f"teacher '{source}' cannot be loaded: its {part}: {kind}{told}") from None


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no regular file, too large, or no JSON object.
    """
    try:
        if not file.is_file() or file.stat().st_size > TEXT_BYTES:
            raise ValueError(f"{file} is no regular file, or too large")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is no JSON object")
    return value


def header_of(file: Path) -> dict[str, Tensor]:
    """A file's tensors as shapes without values. What is no plain number is of dtype uint8.

    Raises:
        UserError: it is not there, may not be read, or is no safetensors file.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe would be waited for
            raise UserError(f"{file} is no regular file")
        with safe_open(file, "pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {
                name: torch.empty(
                    own.get_shape(), dtype=_FLOATS.get(own.get_dtype(), torch.uint8), device="meta"
                )
                for name, own in slices.items()
            }
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except PermissionError:
        raise UserError(f"{file} may not be read: permission denied") from None
    except (SafetensorError, OSError):
        with file.open("rb") as stream:
            if stream.read(40).startswith(b"version https://git-lfs"):
                raise UserError(
                    f"{file} is a git-lfs pointer, not the file it stands for; fetch that with: "
                    "git lfs pull"
                ) from None
        raise UserError(f"{file} is damaged, or no safetensors file") from None

"""Files that are complete or absent: every file is written under a temporary name, synced, then
renamed. What is read is checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rapm.errors import UserError, first_line

T = TypeVar("T")
# Ours, and what safetensors writes to before it renames.
_LEFTOVER = re.compile(r"\..+\.partial|\.tmp\w{6}")


class NotWritten(OSError):
    """Which file could not be written, and why, in one line."""


class NoFile(UserError):
    """There is no such file."""


class Damaged(UserError):
    """A file is not what was written."""


# ---- writing


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:
        raise NotWritten(f"{path} could not be written: {first_line(error)}") from None


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    folder = path.is_dir()
    # Windows and some network drives sync no folders.
    with suppress(OSError) if folder else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``; on success it is synced and renamed to it, on failure
    removed.

    Raises:
        NotWritten: the disk is full, say.
    """
    # By process: two may be at the same file of a folder that runs share.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def files_together(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder for files that belong together. Once all are written they are moved
    into ``folder``, which may be a link; before, nothing is. What else is there stays."""
    temporary = folder / ".files.partial"
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            made = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
            for file in made:
                sync(file)
            for file in made:
                place = folder / file.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
            for each in {folder, *(folder / file.relative_to(temporary) for file in made)}:
                sync(each if each.is_dir() else each.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):  # that is still empty
                folder.rmdir()


def is_leftover(path: Path) -> bool:
    """Whether it is what a write that was killed left behind."""
    return _LEFTOVER.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Deletes what killed writes left in a folder; nobody else may be writing there."""
    for path in filter(is_leftover, list(folder.iterdir()) if folder.is_dir() else ()):
        with suppress(OSError):  # Windows deletes nothing that another program has open
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    with complete_or_absent(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """To a log. Of all files this kind alone may end in half a line."""
    with _told(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file.

    Raises:
        NotWritten: it could not be.
    """
    with complete_or_absent(path) as temporary:
        given = {k: v.detach().contiguous() for k, v in tensors.items()}
        save_file(given, temporary, dict(metadata or {}))
        share(temporary)


def save_checked(path: Path, tensors: Mapping[str, Tensor], made: Mapping[str, Any]) -> None:
    """Writes a safetensors file that tells of itself, and that :func:`load_checked` reads.

    Args:
        made: what it was made from, as JSON.
    """
    # In one entry: safetensors writes several in any order, and equal runs leave equal files.
    told = {**made, "sha256": _digest(tensors, made)}
    save_tensors(path, tensors, {"made": json.dumps(told)})


def share(file: Path) -> None:
    """Gives a file the permissions any new file has; safetensors makes its files for their owner
    alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


# ---- reading


def read(path: Path) -> bytes:
    """
    Raises:
        NoFile: there is none.
        UserError: it is no regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is no file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NoFile(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def load_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """
    Raises:
        Damaged: what is read meanwhile is none of ours.
    """
    try:
        with path.open("rb"):  # safetensors says of any file it cannot open that there is none
            pass
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    # Of safetensors, of torch's types and of JSON: they have no base in common.
    except (SafetensorError, ValueError, LookupError, RuntimeError, TypeError) as error:
        raise Damaged(f"{path} is damaged ({first_line(error)})") from None


def load_made(path: Path) -> dict[str, Any]:
    """What a file of :func:`save_checked` was made from; its tensors are not read.

    Raises:
        Damaged: it cannot be told.
    """
    with _whole(path):
        made = json.loads(load_metadata(path).get("made", "{}"))
    if not isinstance(made, dict):
        raise Damaged(f"{path} is damaged (its metadata)")
    return made


def load_checked(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a file of :func:`save_checked` was made from, and its tensors.

    Raises:
        Damaged: it is not what was written.
    """
    made = load_made(path)
    with _whole(path):
        # Copied: what is read is mapped from the file, and Windows deletes no file that is.
        tensors = {name: value.clone() for name, value in load_tensors(path).items()}
    told = made.pop("sha256", "none")
    if told != _digest(tensors, made):
        raise Damaged(f"{path} is damaged (its checksum is another)")
    return made, tensors


def _digest(tensors: Mapping[str, Tensor], made: Mapping[str, Any]) -> str:
    """Of names, types, shapes and values."""
    whole = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        whole.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_prefix(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of ``tensors`` that :func:`with_prefix` put there, under its own names again."""
    return {
        key.removeprefix(f"{prefix}."): value
        for key, value in tensors.items()
        if key.startswith(f"{prefix}.")
    }

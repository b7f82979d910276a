"""Captions to draw from, and pictures to compare with: COCO's files, a folder, a list."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from rapm.errors import UserError, first_line
from rapm.io import read
from rapm.text import is_unicode

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
Captions = list[tuple[str, str]]  # text, and the name of its picture or ""


def pictures_in(folder: Path) -> list[Path]:
    """A folder's pictures, by name.

    Raises:
        UserError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder of pictures {folder}")
    seen = (file for file in folder.iterdir() if not file.name.startswith("."))
    found = sorted(file for file in seen if file.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{folder} holds no picture ({', '.join(sorted(PICTURES))})")
    return found


def open_picture(file: Path) -> Image.Image:
    """In RGB, as clean-fid reads it: what is transparent and how a camera was held do not count.

    Raises:
        UserError: it cannot be read, or has more than 8 bits a channel.
    """
    try:
        with Image.open(file) as picture:
            if picture.mode.startswith(("I", "F")):  # which would be clipped to white
                raise UserError(f"{file} has more than 8 bits a channel; convert it to 8")
            return picture.convert("RGB")
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is no picture, or damaged ({error})") from None


def read_captions(file: Path) -> Captions:
    """All captions of a file: COCO's ``captions_val2014.json``; Karpathy's ``dataset_coco.json``,
    its test split; ``metadata.jsonl`` with ``file_name`` and ``text``; else a text a line.

    Of a picture with several captions the first is taken.

    Raises:
        UserError: it is none of these, or empty.
    """
    content = read(file)
    try:
        found = _captions(file, content.decode("utf-8-sig"))
        odd = [pair for pair in found if not all(isinstance(part, str) for part in pair)]
        odd += [pair for pair in found if not pair[0] or not all(map(is_unicode, pair))]
        if odd:
            raise ValueError(f"no text: {odd[0]}")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{file} holds no captions that can be read ({what})") from None
    if not found:
        raise UserError(f"{file} holds no caption")
    return found


def _captions(file: Path, text: str) -> Captions:
    if file.suffix.lower() == ".json":
        told = json.loads(text)
        first = dict(_karpathy(told) if "annotations" not in told else _coco(told))
        return [(caption, name) for name, caption in first.items()]
    if file.suffix.lower() == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [(" ".join(row["text"].split()), row["file_name"]) for row in rows]
    return [(line.strip(), "") for line in text.splitlines() if line.strip()]


def _coco(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and captions, the lowest number last: of equal names a dict keeps the last."""
    names = {image["id"]: image["file_name"] for image in told["images"]}
    for each in sorted(told["annotations"], key=lambda a: a["id"], reverse=True):
        yield names[each["image_id"]], " ".join(each["caption"].split())


def _karpathy(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for image in told["images"]:
        if image["split"] == "test":
            yield image["filename"], " ".join(image["sentences"][0]["raw"].split())


def captions_beside(folder: Path) -> Captions:
    """Of pictures with a text file of the same name beside each, or a ``metadata.jsonl``.

    Raises:
        UserError: a picture has no caption.
    """
    if (folder / "metadata.jsonl").is_file():
        return read_captions(folder / "metadata.jsonl")
    found = []
    for picture in pictures_in(folder):
        file = picture.with_suffix(".txt")
        if not file.is_file():
            raise UserError(
                f"{picture} has no caption: no {file.name}, no metadata.jsonl beside it"
            )
        try:
            text = " ".join(read(file).decode("utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error}") from None
        if not text:
            raise UserError(f"{file} is empty; it is the caption of {picture.name}")
        found.append((text, picture.name))
    return found


def chosen(captions: Captions, count: int) -> Captions:
    """``count`` of them, always the same.

    Raises:
        UserError: there are fewer.
    """
    if count > len(captions):
        raise UserError(f"--count {count:,}: there are {len(captions):,} captions")
    rng = Random("rapm captions")
    order = sorted(range(len(captions)), key=lambda _: rng.random())
    return [captions[k] for k in order[:count]]

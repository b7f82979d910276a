"""Prompts, and what is to be said about them before they are used."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rapm.errors import UserError
from rapm.prompt_files import READERS, Row, hub_rows, read_text
from rapm.text import is_unicode

HUB = "hub:"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: without line breaks.
        seed: of its noise; None takes the run's.
    """

    text: str
    seed: int | None = None


@dataclass(frozen=True)
class PromptList:
    """Prompts as they were read.

    Attributes:
        prompts: in their order, each once.
        duplicates: how many came again with the same text and the same seed, and were left out.
    """

    prompts: list[Prompt]
    duplicates: int


def is_hub(source: str | Path) -> bool:
    """Whether it names a data set of the hub and not a file."""
    return str(source).startswith(HUB)


def read_prompts(source: str | Path) -> PromptList:
    """Reads prompts from a .txt, .csv, .tsv, .jsonl or .parquet file, or from
    ``hub:OWNER/NAME[@REVISION][:SPLIT]``.

    Raises:
        UserError: there is no such source, or something in it is no prompt; the line says where.
    """
    if is_hub(source):
        rows = hub_rows(str(source))
    else:
        file = Path(source)
        if not file.is_file():
            raise UserError(f"there is no prompt file {file}")
        if file.suffix.lower() not in READERS:
            raise UserError(
                f"{file}: prompts are read from {', '.join(READERS)} files and from hub:OWNER/NAME"
            )
        rows = READERS[file.suffix.lower()](file)
    every = [_prompt(row) for row in rows]
    if not every:
        raise UserError(f"{source} holds no prompts")
    once = list(dict.fromkeys(every))
    return PromptList(once, len(every) - len(once))


_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f\ufeff]")


def _prompt(row: Row) -> Prompt:
    """
    Raises:
        UserError: there is no text or no integer where there should be.
    """
    if row.text is not None and not isinstance(row.text, str):
        raise UserError(f"{row.where}: {row.name} is not text (given: {row.text!r})")
    text = " ".join(line.strip() for line in (row.text or "").splitlines()).strip()
    if not text:
        raise UserError(f"{row.where}: {row.name} is empty")
    if not is_unicode(text):
        raise UserError(f"{row.where}: {row.name} holds half a character (a lone surrogate)")
    if _CONTROL.search(text):
        raise UserError(
            f"{row.where}: {row.name} holds control characters; is the file UTF-16? Save it as "
            f"UTF-8 (given: {text[:80]!r})"
        )
    try:
        seed = _seed(row.seed)
        if seed is not None and not -(2**63) <= seed < 2**63:
            raise ValueError
        return Prompt(text, seed)
    except ValueError:
        raise UserError(
            f"{row.where}: seed is not an integer of 64 bits (given: {row.seed!r})"
        ) from None


def _seed(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float):  # what many tools make of a column of integers with gaps
        if value != value:
            return None
        if not value.is_integer():
            raise ValueError
        return int(value)
    if not isinstance(value, str):
        raise ValueError
    text = value.strip().removesuffix(".0")
    return int(text) if text else None


# ---- shipped prompts


def shipped(count: int | None, seed: int) -> list[str]:
    """The first ``count`` shipped prompts in the order of ``seed``, or all: the same on every
    machine, and the same first ones however many are asked for.

    Raises:
        UserError: the package has fewer.
    """
    prompts = read_text(Path(__file__).with_name("prompts.txt")).splitlines()
    if count and count > len(prompts):
        raise UserError(f"{count:,} prompts are asked for; rapm has {len(prompts):,}")
    rng = Random(f"rapm prompts {seed}")  # random() alone is the same in every version of Python
    return sorted(prompts, key=lambda _: rng.random())[:count]


# ---- report


def token_limit(tokenizers: Sequence[Any]) -> int:
    """How many tokens of a prompt a teacher with these tokenizers sees, start and end marks
    included."""
    return max(tokenizer.model_max_length for tokenizer in tokenizers)


def count_longer(texts: Sequence[str], tokenizers: Sequence[Any]) -> int:
    """How many texts none of the tokenizers sees whole, start and end marks included."""
    cut = [
        [
            len(ids) > tokenizer.model_max_length
            for ids in tokenizer(list(texts), truncation=False).input_ids
        ]
        for tokenizer in tokenizers
    ]
    return sum(map(all, zip(*cut, strict=True)))


def report(prompts: PromptList, used: int, longer: int, limit: int) -> str:
    """One line about prompts of which at most ``used`` are used, and ``longer`` of these have more
    tokens than ``limit``."""
    number = len(prompts.prompts)
    parts = [
        f"{number:,} prompt{'s' * (number > 1)}"
        + (f", of which the first {used:,} are used" if number > used else "")
    ]
    if prompts.duplicates:
        parts.append(f"{prompts.duplicates:,} duplicate{'s' * (prompts.duplicates > 1)} left out")
    if longer:
        parts.append(
            f"{longer:,} longer than {limit} tokens, whose end{'s' * (longer > 1)} the teacher "
            f"does not see"
        )
    return "; ".join(parts)

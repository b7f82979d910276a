"""Settings out of files, presets and the command line, and back into a file. Alone knows TOML."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError

from rapm.config import Config, MethodName, keys, unread
from rapm.errors import UserError
from rapm.io import NoFile, read
from rapm.presets import CONFIGS, presets
from rapm.prompts import is_hub
from rapm.text import is_unicode

SECTIONS = {key.partition(".")[0] for key in keys(Config) if "." in key}

# These change what a run costs and leaves behind, and what it computes by no more than rounding.
_FREE_ON_RESUME = {
    "device",
    "trajectories.batch_size",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.slot_batch",
    "training.gradient_checkpointing",
    "training.compile",
    "samples.every",
    "samples.count",
    "evaluate.every",
}
# Where things lie. What they are, trajectories' fingerprints say, so files may move.
_PLACES = {"teacher", "teacher_config", "teacher_loras", "trajectories.prompts"}


def load(
    file: Path | None = None,
    *,
    method: str | None = None,
    preset: str | None = None,
    teacher: str | None = None,
    teacher_config: Path | None = None,
    teacher_loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    size: str | None = None,
    settings: Sequence[str] = (),
) -> Config:
    """Puts a configuration together: defaults, the method's, the preset's, the file's, ``--set``.

    Args:
        file: TOML file.
        method: "rapm" when nothing names another.
        preset: name of a shipped one; a teacher that a preset is named after takes it by itself.
        teacher: overrides the teacher; a folder or file is kept as an absolute path, as a run may
            go on from another place.
        teacher_config, teacher_loras, prompts, size: override those settings likewise.
        settings: ``section.key=value`` each.

    Raises:
        UserError: anything in them is wrong.
    """
    for name, value in (("teacher", teacher), ("prompts", prompts)):
        if value is not None and not str(value).strip():
            raise UserError(f"--{name} is empty")
    options: dict[str, Any] = {
        name: value
        for name, value in (
            ("method", method),
            ("teacher", teacher),
            ("teacher_config", str(teacher_config) if teacher_config else None),
            ("teacher_loras", list(teacher_loras)),
            ("trajectories", {"prompts": str(prompts)} if prompts else {}),
        )
        if value
    }
    given = [_absolute(_read(file), file.parent)] if file else []
    given += [_absolute(part, Path()) for part in (*map(_setting, settings), options)]
    given += [{"trajectories": {"size": size}}] if size else []

    def last(key: str, default: str) -> str:
        return next((table[key] for table in reversed(given) if key in table), default)

    teacher_name = last("teacher", Config.model_fields["teacher"].default)
    if preset is None and teacher_name in presets():
        preset = teacher_name
    origins = [*([str(file)] if file else []), *(["settings"] if settings or not file else [])]
    origin = " and ".join(origins)
    table = _preset(preset, last("method", ""))
    for part in given:
        for key in SECTIONS & part.keys():
            if not isinstance(part[key], Mapping):  # else it would replace what others set there
                raise UserError(
                    f"{origin}: {key} is a section: write {key}.KEY=VALUE "
                    f"(given: {_shortened(repr(part[key]))})"
                )
        table = _merge(table, part)
    return parse(table, origin)


def _preset(name: str | None, method: str) -> dict[str, Any]:
    """What a preset and a method set: ``methods/M``, ``presets/P`` and ``presets/P.M`` if any.

    Raises:
        UserError: there is none of that name, or it is another method's.
    """
    if name is not None and name not in presets():
        raise UserError(f"there is no preset '{name}'; there are: {', '.join(presets())}")
    table = _read(CONFIGS / "presets" / f"{name}.toml") if name else {}
    own = table.get("method")
    if own and method and own != method:
        raise UserError(f"preset '{name}' is of method '{own}', not '{method}'")
    method = method or own or Config.model_fields["method"].default
    methods = get_args(MethodName)
    if method not in methods:
        raise UserError(f"there is no method '{method}'; there are: {', '.join(methods)}")
    files = [CONFIGS / "methods" / f"{method}.toml", CONFIGS / "presets" / f"{name}.{method}.toml"]
    for_method, for_both = ([_read(file)] if file.is_file() else [] for file in files)
    merged: dict[str, Any] = {}
    for part in (*for_method, table, *for_both):
        merged = _merge(merged, part)
    return merged


def parse(table: Mapping[str, Any], origin: str) -> Config:
    """Validates a table.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type or value; ``origin`` says
            whose table it was.
    """
    try:
        for key, value in flatten(table).items():
            if isinstance(value, str) and not is_unicode(value):
                raise UserError(f"{origin}: {key} is not UTF-8 text (given: {value!r})")
        try:
            return Config.model_validate(table)
        except ValidationError as error:
            raise UserError(f"{origin}: {_mistake(error)}") from None
    except RecursionError:
        raise UserError(f"{origin}: tables are nested too deeply") from None


def _mistake(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    if unknown:
        table = unknown["input"] if isinstance(unknown["input"], Mapping) else {}
        key = ".".join([*map(str, unknown["loc"]), *list(flatten(table))[:1]])
        near = difflib.get_close_matches(key, list(keys(Config)), 1, 0.5)
        return f"unknown key '{_shortened(key)}'" + (f"; did you mean '{near[0]}'?" if near else "")
    # Of a union's branches, the one that got furthest, without its name.
    first = max(errors, key=lambda e: len(e["loc"]))
    key = ".".join(str(part) for part in first["loc"] if not {*"-["} & {*str(part)})
    message, value = first["msg"].removeprefix("Value error, "), first["input"]
    if not key:
        return message
    hint = ""
    if first["type"] == "string_type" and type(value) in (int, float):
        hint = f"; text needs quotes of its own: '{key}=\"{value}\"'"
    return f"{key}: {message} (given: {_shortened(repr(value))}){hint}"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]} ..."


def dump(config: Config) -> str:
    """The configuration as TOML: every key that its method reads, written out."""
    kept: dict[str, Any] = {}
    left_out = unread(config.method)
    for key, value in flatten(config.model_dump(exclude_none=True)).items():
        if key not in left_out:
            kept = _merge(kept, _nested(key, value))
    return tomli_w.dumps(kept)


def read_run(text: str, origin: str) -> Config:
    """A run's configuration, as :func:`dump` wrote it.

    Raises:
        UserError: it is damaged or of another version.
    """
    table = _toml(text, origin)
    if "method" not in table:
        raise UserError(
            f"{origin} names no method: the run was made by an older rapm, and this one cannot go "
            "on with it; nothing in it was changed: choose another folder"
        )
    return parse(table, origin)


def differences(old: Config, new: Config, *, may_have_moved: bool = False) -> list[str]:
    """The keys in which two configurations would compute different results, with both values.

    More iterations are the same result and then some, where no learning rate falls to an end.

    Args:
        may_have_moved: leave out those that say where teacher and prompts lie.
    """
    if old.method != new.method:
        return [f"method: {old.method!r} -> {new.method!r}"]
    a, b = flatten(old.model_dump()), flatten(new.model_dump())
    free = _FREE_ON_RESUME | (_PLACES if may_have_moved else set())
    changed = {
        key: f"{key}: {a[key]!r} -> {b[key]!r}" for key in a if a[key] != b[key] and key not in free
    }
    if old.training.iterations < new.training.iterations:  # the first ones are the same, unless:
        if old.training.decay:
            changed["training.iterations"] += (
                f", and training.decay = {old.training.decay:g} has made all learning rates fall "
                "towards the earlier end"
            )
        else:
            del changed["training.iterations"]
    return list(changed.values())


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _absolute(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Makes what it names of files and folders absolute; ``~`` is the home folder."""

    def found(name: object, *, must: bool) -> Any:
        if not isinstance(name, str) or not name or is_hub(name):
            return name
        path = os.path.abspath(folder / os.path.expanduser(name))
        # Else it may be a hub id, or a teacher that a preset is named after.
        return path if must or (name not in presets() and os.path.exists(path)) else name

    table = dict(table)
    for key, must in (("teacher", False), ("teacher_config", True)):
        if key in table:
            table[key] = found(table[key], must=must)
    if isinstance(table.get("teacher_loras"), list):  # each with its strength at its end
        table["teacher_loras"] = [found(name, must=True) for name in table["teacher_loras"]]
    section = table.get("trajectories")
    if isinstance(section, Mapping) and "prompts" in section:
        table["trajectories"] = {**section, "prompts": found(section["prompts"], must=True)}
    return table


def _read(file: Path) -> dict[str, Any]:
    try:
        return _toml(read(file).decode(), str(file))
    except NoFile:
        raise UserError(f"there is no config file {file}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a TOML file: {error}") from None


def _toml(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{origin}: tables are nested too deeply") from None
    except ValueError as error:  # of TOML, and of Python's longest integer
        raise UserError(f"{origin} is not a TOML file: {error}") from None


def _setting(text: str) -> dict[str, Any]:
    """``training.iterations=100`` as a nested table; a value that is no TOML is taken as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: write KEY=VALUE, for instance training.iterations=100")
    parsed: Any
    try:
        table = _toml(f"value = {value}", "")
        parsed = table["value"]
        if len(table) > 1 or re.match("[+-]?0[xob]", value.strip()):  # more lines, and 0x0 pixels
            raise UserError("no value")
    except UserError:
        parsed = value.strip()
    return _nested(key.strip(), parsed)

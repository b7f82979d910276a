"""The options that settings come from, shared by commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from rapm.presets import presets


def _settings(
    method: Annotated[
        str | None, typer.Option(help="'rapm', the paper's; or 'midpoint', ours.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"Teacher and memory: {', '.join(presets())}.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="'toy', a folder in diffusers' layout, a .safetensors checkpoint, a hub id, "
            "'random:sd15' or 'random:sdxl'."
        ),
    ] = None,
    teacher_config: Annotated[
        Path | None,
        typer.Option(
            help="For a .safetensors checkpoint: a folder in diffusers' layout of the same kind, "
            "to do without the hub."
        ),
    ] = None,
    teacher_lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA to fuse into the teacher, FILE or FILE:STRENGTH; repeatable."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A .txt, .csv, .tsv, .jsonl or .parquet file, or "
            "hub:OWNER/NAME[@REVISION][:SPLIT]."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pictures' size, WIDTHxHEIGHT; several with commas between. The teacher's own "
            "when left out."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings, a TOML file.")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="One setting, KEY=VALUE, such as training.iterations=100; repeatable."),
    ] = None,
) -> Any:
    """What these options ask for: a :class:`rapm.config.Config`."""
    from rapm.settings import load

    return load(
        config,
        method=method,
        preset=preset,
        teacher=teacher,
        teacher_config=teacher_config,
        teacher_loras=teacher_lora or (),
        prompts=prompts,
        size=size,
        settings=set or (),
    )


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command :func:`_settings`'s options; its ``chosen()`` gives what they ask for."""
    options = inspect.signature(_settings, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @wraps(command)
    def parsed(**given: Any) -> None:
        mine = {name: value for name, value in given.items() if name in own}
        asked = {n: value for n, value in given.items() if n in options and value is not None}
        command(chosen=partial(_settings, **asked), **mine)

    parameters = [*(p for name, p in own.items() if name != "chosen"), *options.values()]
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {p.name: p.annotation for p in parameters}
    return parsed

"""The command line: parse, call the library, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rapm.commands import (
    RunArgument,
    doctor,
    leave_busy_cores,
    plan,
    presets,
    print_files,
    prompts,
    report,
    sample,
    ui,
)
from rapm.errors import UserError
from rapm.evaluating import evaluate
from rapm.options import with_settings
from rapm.text import one_line, output

if TYPE_CHECKING:
    from rapm.run import Run

app = typer.Typer(
    name="rapm",
    help="Distil a text-to-image model into a 1 to 8 step generator on one GPU, from prompts "
    "alone: RAPM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _tell_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"rapm {version('rapm')}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Its number.")
    ] = False,
) -> None: ...


OutOption = Annotated[
    Path, typer.Option("--out", help="The run's folder; the same command again goes on with it.")
]


def _open_run(chosen: Any, out: Path, patience: float = 0) -> Run:
    """The run that a command's options ask for; says what it begins with."""
    config = chosen()
    from rapm import pipeline
    from rapm.status import loras_of

    preset = chosen.keywords.get("preset")
    run = pipeline.open_run(config, Path(os.path.expanduser(out)), preset, patience)
    print("\n".join([*loras_of(config), pipeline.describe_prompts(run)]))
    _say_where_it_goes_on(run)
    return run


def _say_where_it_goes_on(run: Run) -> None:
    from rapm.status import standing

    steps = run.checkpoint_steps()
    if steps and steps[-1] < run.config.training.iterations:
        print(f"Goes on from {standing(run)}")


TrackerOption = Annotated[
    str, typer.Option("--tracker", help="Show it in 'tensorboard' or 'wandb' besides its page.")
]


@contextmanager
def _told_when_stopped(run: Run) -> Iterator[None]:
    from rapm.status import standing

    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped. {run.folder} has {standing(run)}. The same command goes on from there.")
        raise typer.Exit(130) from None


@app.command()
@with_settings
def distill(
    chosen: Any,
    out: OutOption,
    force: Annotated[
        bool, typer.Option("--force", help="Begin even though disk or memory cannot suffice.")
    ] = False,
    tracker: TrackerOption = "",
) -> None:
    """The whole chain: trajectories, training, export, pictures."""
    from rapm import pipeline
    from rapm.estimate import check_room, make_plan, render
    from rapm.io import write_text
    from rapm.measure import gpus_here
    from rapm.models.resolve import teacher_of
    from rapm.trackers import check_tracker

    check_tracker(tracker)
    run = _open_run(chosen, out)
    config = run.config
    plan = make_plan(config, teacher_of(config))
    told = render(plan, config, gpus_here())
    print(told)
    with run.locked():
        write_text(run.plan, f"{told}\n")
    no_gpu = config.torch_device == "cpu" and config.device == "auto"
    why = ", as torch sees no GPU (see rapm doctor)" if no_gpu else ""
    print(f"Computes on {config.torch_device}{why}")
    leave_busy_cores(config)
    if not force:
        check_room(plan, config, run.folder)
    with _told_when_stopped(run):
        if not pipeline.distill_run(run, tracker):
            raise KeyboardInterrupt
    print_files(run)


PATIENCE = 20.0  # seconds: many processes may open a run at the same moment


def _take_own_gpu() -> None:
    """As accelerate and torchrun number the processes of a host."""
    import torch

    if (rank := os.environ.get("LOCAL_RANK", "")).isdecimal() and torch.cuda.is_available():
        torch.cuda.set_device(int(rank))


def _share(text: str) -> tuple[int, int]:
    """(i, n) out of I/N."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--shard {text}: write I/N, of N parts the I-th from 0, such as 0/4")
    return int(part), int(parts)


@app.command()
@with_settings
def trajectories(
    chosen: Any,
    run: Annotated[Path | None, typer.Argument(help="A run to go on with, or to show.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of a new run.")] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Draw so many of them, at the coarse timesteps.")
    ] = 0,
    shard: Annotated[
        str, typer.Option(help="I/N: of N parts the I-th alone, from 0, for folders not shared.")
    ] = "0/1",
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="A run whose finished shards are taken over first; repeatable."),
    ] = None,
) -> None:
    """Only the first stage: roll out the teacher and store its trajectories.

    The same command in several processes, on any hosts that share the folder, shares the work; so
    does 'rapm trajectories RUN' beside a 'rapm distill' that rolls out.
    """
    from rapm import pipeline
    from rapm.pictures import show_trajectories
    from rapm.run import Run

    if (run is None) == (out is None):
        raise UserError("name either the folder of a run, or a new one with --out")
    for option in chosen.keywords if run else ():
        raise UserError(f"{run} has its own settings; --{option.replace('_', '-')} goes with --out")
    part, parts = _share(shard)
    _take_own_gpu()
    opened = Run.existing(run) if run else _open_run(chosen, out or Path(), PATIENCE)
    leave_busy_cores(opened.config)
    others = [Run.existing(other).folder for other in merge or ()]
    with _told_when_stopped(opened):
        store = pipeline.make_share(opened, (part, parts), others)
    if store is None:
        print(
            f"Part {part} of {parts} is in {opened.trajectories}. Bring the others together with "
            "--merge RUN"
        )
        return
    if store.manifest["shard_size"]:
        print(f"{len(store)} trajectories in {store.folder}")
    else:
        print(
            f"Method '{opened.config.method}' learns without a rollout: {len(store)} pairs of "
            f"prompt and noise are ready in {store.folder}, no trajectories"
        )
    if show:
        print(f"Picture: {show_trajectories(opened, show)}")


@app.command()
def train(run: RunArgument, tracker: TrackerOption = "") -> None:
    """Train the student of a run that has its trajectories, or go on with it."""
    from rapm import pipeline
    from rapm.export import export_run
    from rapm.report import write_report
    from rapm.run import Run
    from rapm.trackers import check_tracker

    opened = Run.existing(run)
    check_tracker(tracker)
    _say_where_it_goes_on(opened)
    leave_busy_cores(opened.config)
    with _told_when_stopped(opened), opened.locked():
        if not pipeline.train_run(opened, tracker):
            raise KeyboardInterrupt
        export_run(opened)
        write_report([opened], opened.page)
    print_files(opened)


@app.command()
def export(
    run: RunArgument,
    checkpoint: Annotated[
        int | None, typer.Option(help="Its iteration; the newest when left out.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the LoRA files' numbers.")
    ] = "fp32",
    fused: Annotated[
        bool, typer.Option("--fused", help="A whole pipeline with the LoRA in its weights, too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; the run's export/ when left out.")
    ] = None,
) -> None:
    """Write a checkpoint's student as LoRA files for diffusers and other programs.

    Each file is read back by diffusers and held to the student before it takes its place.
    """
    from rapm.export import export_run
    from rapm.run import Run

    opened = Run.existing(run)
    if out and out.is_file():
        raise UserError(f"--out {out} is a file; name a folder")
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    files = export_run(opened, out, step=checkpoint, dtype=names[dtype], fused=fused)
    if out is None:
        print_files(opened)
    else:
        print(f"LoRA files: {files.diffusers.parent}")


for _command in (sample, evaluate, report, ui, plan, presets, doctor, prompts):
    app.command()(_command)


def main() -> None:
    """Runs a command; a user's mistake is one line and exit code 2."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # of image processors nobody here can help
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nor of kernels for CPUs
    warnings.simplefilter("ignore", FutureWarning)  # diffusers' of teachers' configs, whole
    with output():
        try:
            app()
        # An OSError here is a disk that is full or a folder that may not be written.
        except (UserError, OSError) as error:
            print(f"rapm: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)

"""The command line: parse, call the library, print. Heavy imports wait inside the commands."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapm.errors import UserError
from rapm.options import with_settings

if TYPE_CHECKING:
    from rapm.export import Exported
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

RunArgument = Annotated[Path, typer.Argument(help="The run's folder.")]
OutOption = Annotated[
    Path, typer.Option("--out", help="The run's folder; the same command again goes on with it.")
]


def _open_run(config: Any, out: Path) -> Run:
    """The run that a command's options ask for; says what its prompts are."""
    from rapm import pipeline

    run = pipeline.open_run(config, Path(os.path.expanduser(out)))
    print(pipeline.describe_prompts(run))
    _say_where_it_goes_on(run)
    return run


def _say_where_it_goes_on(run: Run) -> None:
    from rapm.status import standing

    steps = run.checkpoint_steps()
    if steps and steps[-1] < run.config.training.iterations:
        print(f"Goes on from {standing(run)}")


def _print_exported(files: Exported) -> None:
    print(f"LoRA for diffusers: {files.diffusers}")
    print(f"LoRA for ComfyUI, Forge and A1111: {files.kohya}")


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
) -> None:
    """The whole chain: trajectories, training, export, pictures."""
    config = chosen()
    from rapm import pipeline
    from rapm.estimate import check_room, make_plan, render
    from rapm.export import exported
    from rapm.measure import gpus_here
    from rapm.models.resolve import teacher_of

    run = _open_run(config, out)
    plan = make_plan(config, teacher_of(config))
    print(render(plan, config, gpus_here()))
    no_gpu = config.torch_device == "cpu" and config.device == "auto"
    why = ", as torch sees no GPU (see rapm doctor)" if no_gpu else ""
    print(f"Computes on {config.torch_device}{why}")
    if not force:
        check_room(plan, config, run.folder)
    with _told_when_stopped(run):
        if not pipeline.distill_run(run):
            raise KeyboardInterrupt
    _print_exported(exported(run))
    for picture in sorted(run.samples.glob("*.png")):
        if not picture.name.startswith("iteration-"):  # one row each of iterations.png
            print(f"Picture: {picture}")


@app.command()
@with_settings
def trajectories(
    chosen: Any,
    run: Annotated[Path | None, typer.Argument(help="A run to go on with, or to show.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of a new run.")] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Draw so many of them, at the coarse timesteps.")
    ] = 0,
) -> None:
    """Only the first stage: roll out the teacher and store its trajectories."""
    from rapm import pipeline
    from rapm.pictures import show_trajectories
    from rapm.run import Run

    if (run is None) == (out is None):
        raise UserError("name either the folder of a run, or a new one with --out")
    for option in chosen.keywords if run else ():
        raise UserError(f"{run} has its own settings; --{option.replace('_', '-')} goes with --out")
    opened = Run.existing(run) if run else _open_run(chosen(), out)  # type: ignore[arg-type]
    with _told_when_stopped(opened), opened.locked():
        store = pipeline.make_trajectories(opened)
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
@with_settings
def plan(
    chosen: Any,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Make a few real iterations too, with random weights, and time them."
        ),
    ] = False,
) -> None:
    """What a run would cost: disk, memory, network calls, hours. Loads no weights."""
    config = chosen()
    from rapm import estimate
    from rapm import measure as measuring
    from rapm.models.resolve import architecture_of

    teacher = architecture_of(config)
    planned = estimate.make_plan(config, teacher)
    gpus = measuring.gpus_here() or estimate.GPUS
    measured = measuring.measure(config, teacher) if measure else None
    print(estimate.render(planned, config, gpus, measured))


@app.command()
def doctor() -> None:
    """What this machine has and lacks, each problem with its remedy."""
    from rapm.doctor import examine

    for line in examine():
        print(line)


@app.command()
def prompts(
    out: Annotated[Path, typer.Option("--out", help="The .txt file to write, one prompt a line.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, another choice.")] = 0,
) -> None:
    """Write some of the shipped prompts, for those who have none."""
    from rapm.io import write_text
    from rapm.prompts import shipped

    if out.exists():
        raise UserError(f"--out {out} is there already; name another file")
    if out.suffix.lower() != ".txt":
        raise UserError(
            f"--out {out}: prompts are written one a line, into a file that ends in .txt"
        )
    write_text(out, "\n".join(shipped(count, seed)) + "\n")
    print(f"{count:,} prompt{'s' * (count > 1)} in {out}")


@app.command()
def train(run: RunArgument) -> None:
    """Train the student of a run that has its trajectories, or go on with it."""
    from rapm import pipeline
    from rapm.export import export_run
    from rapm.run import Run

    opened = Run.existing(run)
    _say_where_it_goes_on(opened)
    with _told_when_stopped(opened), opened.locked():
        if not pipeline.train_run(opened):
            raise KeyboardInterrupt
        _print_exported(export_run(opened))


@app.command()
def export(run: RunArgument) -> None:
    """Write the newest checkpoint's student as LoRA files for diffusers and other programs."""
    from rapm.export import export_run
    from rapm.run import Run

    _print_exported(export_run(Run.existing(run)))


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt; repeatable. None: held-out captions, or the run's prompts."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count up.")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The student's steps; N when left out.")
    ] = None,
    few_steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The teacher's steps in the second row.")
    ] = None,
    many_steps: Annotated[
        int, typer.Option(min=1, max=1000, help="The teacher's steps in the first row.")
    ] = 100,
    count: Annotated[int, typer.Option(min=1, max=64, help="Pictures a row.")] = 8,
    file: Annotated[
        Path | None, typer.Option(help="The PNG to write; in the run's samples/ when left out.")
    ] = None,
) -> None:
    """Draw teacher at many steps, teacher at few steps and student, from the same seeds.

    While the run trains, too; before its first checkpoint the teacher alone.
    """
    from rapm.run import Run
    from rapm.sample import sample_run

    if file and file.suffix.lower() != ".png":
        raise UserError(f"--file {file}: pictures are PNG, in a file that ends in .png")
    picture = sample_run(
        Run.existing(run),
        prompts=prompt or (),
        seed=seed,
        steps=steps,
        few_steps=few_steps,
        many_steps=many_steps,
        count=count,
        file=file,
    )
    print(f"Picture: {picture}")


@app.command()
def evaluate(
    run: RunArgument,
    split: Annotated[
        str, typer.Option(help="Held-out captions: 'test' to report, 'validation' to tune on.")
    ] = "test",
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 when the student misses a threshold.")
    ] = False,
) -> None:
    """Score the student of a toy run beside its teacher; writes scores.json."""
    from rapm import pipeline
    from rapm.run import Run

    if split not in ("test", "validation"):
        raise UserError(f"--split is 'test' or 'validation', not '{split}'")
    table, missed = pipeline.evaluate_run(Run.existing(run), split)
    print("\n".join(table))
    for line in missed:
        print(f"Missed: the student's {line}")
    if not missed:
        print("The student reaches every threshold.")
    if check and missed:
        raise typer.Exit(1)


def main() -> None:
    """Runs a command; a user's mistake is one line and exit code 2."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # of image processors nobody here can help
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nor of kernels for CPUs
    warnings.simplefilter("ignore", FutureWarning)  # diffusers' of teachers' configs, whole
    try:
        app()
    # An OSError here is a disk that is full or a folder that may not be written.
    except (UserError, OSError) as error:
        print(f"rapm: {error}", file=sys.stderr)
        sys.exit(2)

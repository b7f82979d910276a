"""The command line: parse, call the library, print. Heavy imports wait inside the commands, so help
comes at once."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rapm.errors import UserError

if TYPE_CHECKING:
    from rapm.config import Config
    from rapm.export import Exported
    from rapm.run import Run

app = typer.Typer(
    name="rapm",
    help="Distil a text-to-image model into a 1 to 8 step generator on one GPU, from prompts "
    "alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

OutOption = Annotated[
    Path, typer.Option("--out", help="The run's folder; the same command again goes on with it.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option(
        help="'toy', a folder in diffusers' layout, a .safetensors checkpoint, a hub id, "
        "'random:sd15' or 'random:sdxl'."
    ),
]
TeacherConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="For a .safetensors checkpoint: a folder in diffusers' layout of the same kind, to do "
        "without the hub."
    ),
]
TeacherLoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher-lora", help="A LoRA to fuse into the teacher, FILE or FILE:STRENGTH; repeatable."
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="Pictures' size, WIDTHxHEIGHT; several with commas between. The teacher's own when "
        "left out."
    ),
]
ConfigOption = Annotated[Path | None, typer.Option(help="Settings, a TOML file.")]
PresetOption = Annotated[str | None, typer.Option(help="A shipped configuration, by name.")]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .csv, .tsv, .jsonl or .parquet file, or hub:OWNER/NAME[@REVISION][:SPLIT]."
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="One setting, KEY=VALUE, such as training.iterations=1000; repeatable."
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="The run's folder.")]


def _configuration(
    config: Path | None,
    preset: str | None,
    teacher: str | None,
    teacher_config: Path | None,
    teacher_loras: list[str] | None,
    prompts: str | None,
    size: str | None,
    settings: list[str] | None,
) -> Config:
    """What a command's options ask for."""
    from rapm.config import load

    return load(
        config,
        preset=preset,
        teacher=teacher,
        teacher_config=teacher_config,
        teacher_loras=teacher_loras or (),
        prompts=prompts,
        size=size,
        settings=settings or (),
    )


def _open_run(config: Config, out: Path) -> Run:
    """The run that a command's options ask for; says what its prompts are."""
    from rapm import pipeline

    run = pipeline.open_run(config, Path(os.path.expanduser(out)))
    print(pipeline.describe_prompts(run))
    return run


def _print_exported(files: Exported) -> None:
    print(f"LoRA for diffusers: {files.diffusers}")
    print(f"LoRA for ComfyUI, Forge and A1111: {files.kohya}")


@contextmanager
def _told_when_stopped(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"Stopped; everything so far is in {out}. The same command goes on from there.")
        raise typer.Exit(130) from None


@app.command()
def distill(
    out: OutOption,
    teacher: TeacherOption = None,
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    prompts: PromptsOption = None,
    size: SizeOption = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SettingsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Begin even though disk or memory cannot suffice.")
    ] = False,
) -> None:
    """The whole chain: trajectories, training, export, a sheet of pictures."""
    from rapm import pipeline
    from rapm.estimate import check_room, gpus_here, make_plan, render
    from rapm.export import exported
    from rapm.models.resolve import teacher_of

    chosen = _configuration(
        config, preset, teacher, teacher_config, teacher_lora, prompts, size, settings
    )
    run = _open_run(chosen, out)
    plan = make_plan(chosen, teacher_of(chosen))
    print(render(plan, chosen, gpus_here()))
    no_gpu = chosen.torch_device == "cpu" and chosen.device == "auto"
    print(
        f"Computes on {chosen.torch_device}{', as torch sees no GPU (see rapm doctor)' if no_gpu else ''}"
    )
    if not force:
        check_room(plan, chosen, run.folder)
    with _told_when_stopped(run.folder):
        if not pipeline.distill_run(run):
            raise KeyboardInterrupt
    _print_exported(exported(run))
    for picture in sorted(run.samples.glob("*.png")):
        print(f"Picture: {picture}")


@app.command()
def trajectories(
    out: OutOption,
    teacher: TeacherOption = None,
    teacher_config: TeacherConfigOption = None,
    teacher_lora: TeacherLoraOption = None,
    prompts: PromptsOption = None,
    size: SizeOption = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SettingsOption = None,
) -> None:
    """Only the first stage: roll out the teacher and store its trajectories."""
    from rapm import pipeline

    run = _open_run(
        _configuration(
            config, preset, teacher, teacher_config, teacher_lora, prompts, size, settings
        ),
        out,
    )
    with _told_when_stopped(run.folder), run.locked():
        store = pipeline.make_trajectories(run)
    print(f"{len(store)} trajectories in {store.folder}")


@app.command()
def plan(
    teacher: TeacherOption = None,
    teacher_config: TeacherConfigOption = None,
    size: SizeOption = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    settings: SettingsOption = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Make a few real iterations here too, with random weights, and say what they "
            "took.",
        ),
    ] = False,
) -> None:
    """What a run would cost: disk, memory, network calls, hours. Loads no weights."""
    from rapm import plan as planning
    from rapm.models.resolve import architecture_of

    chosen = _configuration(config, preset, teacher, teacher_config, None, None, size, settings)
    found = architecture_of(chosen)
    planned = planning.make_plan(chosen, found)
    gpus = planning.gpus_here() or planning.GPUS
    print(
        planning.render(planned, chosen, gpus, planning.measure(chosen, found) if measure else None)
    )


@app.command()
def doctor() -> None:
    """What this machine has and lacks: versions, GPU, precisions, disk, memory, the hub; each
    problem with its remedy."""
    from rapm.doctor import examine

    for line in examine():
        print(line)


@app.command()
def prompts(
    out: Annotated[Path, typer.Option("--out", help="The .txt file to write, one prompt a line.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another seed, other prompts.")] = 0,
) -> None:
    """Write prompts out of a built-in grammar, for those who have none."""
    from rapm.grammar import compose
    from rapm.io import write_text

    if out.exists():
        raise UserError(f"--out {out} is there already; name another file")
    if out.suffix.lower() != ".txt":
        raise UserError(
            f"--out {out}: prompts are written one a line, into a file that ends in .txt"
        )
    write_text(out, "\n".join(compose(count, seed)) + "\n")
    print(f"{count:,} prompt{'s' * (count > 1)} in {out}")


@app.command()
def train(run: RunArgument) -> None:
    """Train the student of a run that has its trajectories, or go on with it."""
    from rapm import pipeline
    from rapm.export import export_run
    from rapm.run import Run

    opened = Run.existing(run)
    with opened.locked():
        if not pipeline.train_run(opened):
            print(
                f"Stopped; a checkpoint is in {opened.checkpoints}. The same command goes on from "
                f"there."
            )
            raise typer.Exit(130)
        _print_exported(export_run(opened))


@app.command()
def export(run: RunArgument) -> None:
    """Write the newest checkpoint's student as LoRA files for diffusers and for ComfyUI, A1111 and
    Forge."""
    from rapm.export import export_run
    from rapm.run import Run

    _print_exported(export_run(Run.existing(run)))


@app.command()
def sample(
    run: RunArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="A prompt; repeatable. None: captions of the toy world, or the run's own prompts."
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first picture; the next ones count up.")
    ] = 0,
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
    """Draw a sheet: teacher at many steps, teacher at few steps, student, from the same seeds.

    While the run trains, too; before its first checkpoint the teacher alone.
    """
    from rapm import pipeline
    from rapm.run import Run

    if file and file.suffix.lower() != ".png":
        raise UserError(
            f"--file {file}: pictures are written as PNG, into a file that ends in .png"
        )
    picture = pipeline.sample_run(
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
        bool, typer.Option("--check", help="Exit with 1 when the student misses a bar.")
    ] = False,
) -> None:
    """Score the student of a toy run beside its teacher; writes scores.json."""
    from rapm import pipeline
    from rapm.run import Run

    if split not in ("test", "validation"):
        raise UserError(f"--split is 'test' or 'validation', not '{split}'")
    opened = Run.existing(run)
    rows, missed = pipeline.evaluate_run(opened, split)
    print(
        f"{'model':8} {'steps':>5} {'guidance':>8} {'FID':>7} {'captions':>8} {'diversity':>9} "
        f"{'sharpness':>9} {'s/image':>8}"
    )
    for row in rows:
        print(
            f"{row.model:8} {row.steps:5d} {row.guidance_scale:8.1f} {row.fid_to_teacher:7.3f} "
            f"{row.caption_accuracy:8.3f} "
            f"{row.diversity:9.3f} {row.sharpness:9.3f} {row.seconds_per_image:8.3f}"
        )
    for line in missed:
        print(f"Missed: the student's {line}")
    if not missed:
        print("The student clears every bar.")
    if check and missed:
        raise typer.Exit(1)


def main() -> None:
    """Runs a command; a user's mistake is one line and exit code 2."""
    for library in (
        "TRANSFORMERS",
        "DIFFUSERS",
    ):  # they warn of image processors and casts that nobody here can help
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nor of kernels for CPUs
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # diffusers' of teachers' configs, each with the whole config in it
    try:
        app()
    except (
        UserError,
        OSError,
    ) as error:  # an OSError here is a disk that is full or a folder that may not be written
        print(f"rapm: {error}", file=sys.stderr)
        sys.exit(2)

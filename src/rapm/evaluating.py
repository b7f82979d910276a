"""The command that scores: a run's student, or a LoRA that was made elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rapm.commands import leave_busy_cores, print_files
from rapm.errors import UserError
from rapm.options import with_settings

CACHE = "~/.cache/rapm"


# Options that not every protocol reads.
OF_TOY = ("split", "check")
OF_REAL_PICTURES = ("images", "resize", "reference", "with_teacher")
OF_NETWORKS = (
    *("weights", "captions", "count", "prefix", "many_steps", "steps", "scheduler", "guidance"),
    *("cache", *OF_REAL_PICTURES),
)


def _check_read(protocol: str, given: dict[str, Any]) -> None:
    unread = {"toy": OF_NETWORKS, "teacher": (*OF_TOY, *OF_REAL_PICTURES)}.get(protocol, OF_TOY)
    for name in unread:
        if given[name] not in (None, False):
            raise UserError(f"--{name.replace('_', '-')} is not read by protocol {protocol}")


@with_settings
def evaluate(
    chosen: Any,
    target: Annotated[
        Path, typer.Argument(metavar="RUN|LORA", help="A run's folder, or a LoRA's file.")
    ],
    protocol: Annotated[
        Literal["toy", "teacher", "coco", "images"] | None,
        typer.Option(help="What to compare with; toy for toy runs, else teacher, when left out."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder of inception-2015-12-05.pt, and of clip/ and pickscore/."),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="COCO's or Karpathy's .json, metadata.jsonl, or a text a line."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of real pictures.")] = None,
    count: Annotated[
        int | None,
        typer.Option(min=2, help="Captions: teacher 2,500, coco 30,000, images all."),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=4096,
            help="All pictures, real and drawn, to a square of so many pixels first.",
        ),
    ] = None,
    reference: Annotated[
        Literal["all", "paired"] | None,
        typer.Option(help="Compare with all real pictures, or with those of the captions."),
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="For CLIP: put before each text.")] = None,
    many_steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Of the teacher's first row; 50 when left out."),
    ] = None,
    with_teacher: Annotated[
        bool, typer.Option("--with-teacher", help="Score the teacher too.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Of the student or LoRA; N when left out."),
    ] = None,
    scheduler: Annotated[
        Literal["ddim", "euler", "lcm"] | None,
        typer.Option(help="Of the student or LoRA; ddim when left out."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=100,
            help="Of the student or LoRA; none when left out, of FLUX.1 the teacher's.",
        ),
    ] = None,
    split: Annotated[
        Literal["test", "validation"] | None,
        typer.Option(help="Toy captions: 'test' to report, 'validation' to tune on."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 when a toy student misses a threshold.")
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(help=f"Folder of what was read off pictures; {CACHE} when left out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The .json to write of a LoRA's scores.")] = None,
) -> None:
    """Score a run's student, or a LoRA that was made elsewhere.

    Stop it any time: what was read off pictures is kept, and the same command goes on.
    """
    given = locals()
    from rapm.card import tell_scores
    from rapm.evaluate.protocols import MANY_STEPS, Choices
    from rapm.models.resolve import teacher_of
    from rapm.report import write_report
    from rapm.run import Run
    from rapm.scores import evaluate_lora, evaluate_run, evaluate_toy

    is_lora = target.is_file()
    if not is_lora and target.suffix.lower() in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        raise UserError(f"there is no LoRA file {target}")
    if not is_lora:
        for option in chosen.keywords:
            name = option.replace("_", "-")
            raise UserError(f"{target} has its own settings; --{name} goes with a LoRA's file")
        if out:
            raise UserError("--out goes with a LoRA's file; a run keeps its scores in its folder")
    for name in ("method", "prompts"):
        if name in chosen.keywords:
            raise UserError(f"--{name} is not read here: a LoRA is made already")
    run = None if is_lora else Run.existing(target)
    config = chosen() if run is None else run.config
    leave_busy_cores(config)
    if protocol is None:
        is_toy = run is not None and teacher_of(config).captions is not None
        protocol = "toy" if is_toy else "teacher"
    _check_read(protocol, given)
    if many_steps and protocol != "teacher" and not with_teacher:
        raise UserError("--many-steps are the teacher's; it goes with --with-teacher")
    reached = True
    if protocol == "toy":
        if run is None:
            raise UserError("protocol toy scores runs of the toy teacher, not LoRA files")
        lines, reached = evaluate_toy(run, split or "test")
    else:
        if weights is None:
            from rapm.evaluate.features import WHERE

            raise UserError(
                f"--weights DIR is missing, a folder of networks that read pictures: {WHERE}"
            )
        choices = Choices(
            protocol,
            captions=captions,
            images=images,
            count=count,
            resize=resize,
            reference=reference or "all",
            prefix=prefix or "",
            many_steps=many_steps or MANY_STEPS,
            with_teacher=with_teacher,
        )
        shared: dict[str, Any] = {
            "weights": weights,
            "cache": Path(os.path.expanduser(cache or CACHE)),
            "scheduler": scheduler or "ddim",
            "guidance_scale": guidance,
            "steps": steps,
        }
        file = out or target.with_name(f"{target.stem}-scores-{protocol}.json")
        try:
            if run is not None:
                lines = evaluate_run(run, choices, **shared)
            else:
                lines = evaluate_lora(target, config, choices, file=file, **shared)
        except KeyboardInterrupt:
            print("Stopped. What was read off pictures is kept; the same command goes on.")
            raise typer.Exit(130) from None
    print("\n".join(lines))
    if run is not None:
        write_report([run], run.page)
        tell_scores(run)
        print_files(run)
    if check and not reached:
        raise typer.Exit(1)

"""Commands that train nothing: what a run came to, what one would cost, what there is here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rapm.errors import UserError
from rapm.options import with_settings
from rapm.text import is_unicode

if TYPE_CHECKING:
    from rapm.run import Run

RunArgument = Annotated[Path, typer.Argument(help="The run's folder.")]


def leave_busy_cores(config: Any) -> None:
    """Fewer threads, and says so."""
    from rapm.threads import threads_for_idle_cores

    if config.torch_device == "cpu" and (chosen := threads_for_idle_cores()):
        print(chosen)


def print_files(run: Run) -> None:
    """Where pictures, LoRA files and page are."""
    from rapm.status import files_of

    print("\n".join(files_of(run)))


# ---- what a run came to


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

    for text in prompt or ():
        if not is_unicode(text):
            raise UserError(f"--prompt is not UTF-8 text (given: {text!r})")
    if file and file.suffix.lower() != ".png":
        raise UserError(f"--file {file}: pictures are PNG, in a file that ends in .png")
    opened = Run.existing(run)
    leave_busy_cores(opened.config)
    picture = sample_run(
        opened,
        prompts=prompt or (),
        seed=seed,
        steps=steps,
        few_steps=few_steps,
        many_steps=many_steps,
        count=count,
        file=file,
    )
    print(f"Picture: {picture}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; a single run's report.html when left out.")
    ] = None,
) -> None:
    """Write a page about a run, or about several side by side: one file, nothing outside it."""
    from rapm.report import write_report
    from rapm.run import Run

    opened = [Run.existing(run) for run in runs]
    if out is None and len(opened) > 1:
        raise UserError("several runs: name the HTML file to write with --out")
    if out and out.suffix.lower() != ".html":
        raise UserError(f"--out {out}: a page is HTML, in a file that ends in .html")
    print(f"Page: {write_report(opened, out or opened[0].page)}")


def ui(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, or a run's.")],
    host: Annotated[
        str, typer.Option(help="Address; 0.0.0.0 shows it to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 7860,
) -> None:
    """Runs in the browser: how far each is, its pictures and curves, prompts drawn now."""
    from rapm.ui import serve

    page = serve(folder, host, port)
    print(f"http://{host}:{port} shows the runs in {folder}; Ctrl-C ends it")
    page.block_thread()


# ---- about no run


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
    from rapm.presets import check_preset

    teacher = architecture_of(config)
    if preset := chosen.keywords.get("preset"):
        check_preset(preset, teacher)
    if measure:
        leave_busy_cores(config)
    planned = estimate.make_plan(config, teacher)
    gpus = measuring.gpus_here() or estimate.GPUS
    measured = measuring.measure(config, teacher) if measure else None
    print(estimate.render(planned, config, gpus, measured))


def presets() -> None:
    """What --preset can name, and what each is for."""
    from rapm.presets import described
    from rapm.presets import presets as names

    for name in names():
        print(f"{name:12} {described(name)}")


def doctor() -> None:
    """What this machine has and lacks, each problem with its remedy."""
    from rapm.doctor import examine

    for line in examine():
        print(line)


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

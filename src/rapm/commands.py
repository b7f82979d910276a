"""Commands about no run: what one would cost, what this machine has, what is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rapm.errors import UserError
from rapm.options import with_settings


def leave_busy_cores(config: Any) -> None:
    """Fewer threads, and says so."""
    from rapm.threads import threads_for_idle_cores

    if config.torch_device == "cpu" and (chosen := threads_for_idle_cores()):
        print(chosen)


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

"""The table of docs/cost.md: what each preset costs, by `rapm plan`'s own counts.

    python benchmarks/presets.py

No GPU and no weights are needed.
"""

from __future__ import annotations

from typing import get_args

from markers import markdown
from rapm import settings
from rapm.config import MethodName
from rapm.errors import UserError
from rapm.estimate import CONTEXT, GPUS, make_plan
from rapm.models.resolve import architecture_of

SHOWN = ("RTX 3060 12 GB", "RTX 4090 24 GB", "RTX A6000 48 GB", "H100 80 GB")
STAGES = ("trajectories", "training", "pictures")
GIB = 2**30


def row(preset: str, method: str) -> list[str]:
    """A preset's line with one method.

    Raises:
        UserError: the preset is another method's.
    """
    config = settings.load(preset=preset, method=method)
    plan = make_plan(config, architecture_of(config))
    of_stage = {stage: sum(parts.values()) for stage, parts in plan.memory.items()}
    peaks = [of_stage.get(stage, 0) / GIB for stage in STAGES]
    cells = [f"{peak:.1f}" if peak else "" for peak in peaks]
    hours = []
    for rate, memory in (GPUS[gpu] for gpu in SHOWN):
        stages = [f"{plan.hours(rate, stage):.1f}" for stage in STAGES[:2]]
        fits = max(of_stage.values()) + CONTEXT < memory * GIB
        hours.append(" + ".join(stages) if fits else "does not fit")
    return [f"`{preset}`", method, *cells, f"{sum(plan.disk.values()) / GIB:.1f}", *hours]


def main() -> None:
    rows = []
    for preset in settings.presets():
        for method in get_args(MethodName) if not preset.startswith("toy") else ():
            try:
                rows.append(row(preset, method))
            except UserError:
                continue  # the paper's presets are of RAPM alone
    titles = ("preset", "method", *STAGES, "disk", *(f"hours, {gpu}" for gpu in SHOWN))
    print(markdown(titles, rows))


if __name__ == "__main__":
    main()

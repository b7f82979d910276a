"""The table of docs/cost.md: what each preset would cost, by `rapm plan`'s own counts. No GPU and
no weights are needed.

python benchmarks/presets.py
"""

from __future__ import annotations

from rapm import config as configuration
from rapm.estimate import GPUS, make_plan
from rapm.models.resolve import architecture_of

SHOWN = ("RTX 3060 12 GB", "RTX 4090 24 GB", "RTX A6000 48 GB", "H100 80 GB")


def main() -> None:
    print(
        f"| preset | trajectories | training | pictures | disk | "
        f"{' | '.join(f'hours, {name}' for name in SHOWN)} |"
    )
    print(f"|{'---|' * (5 + len(SHOWN))}")
    for name in (name for name in configuration.presets() if name != "toy"):
        config = configuration.load(preset=name)
        plan = make_plan(config, architecture_of(config))
        peaks = [
            sum(plan.memory[stage].values()) / 2**30
            for stage in ("trajectories", "training", "pictures")
        ]
        hours = [
            f"{plan.hours(GPUS[gpu][0], 'trajectories'):.1f} + "
            f"{plan.hours(GPUS[gpu][0], 'training'):.1f}"
            if max(peaks) + 0.6 < GPUS[gpu][1]
            else "does not fit"
            for gpu in SHOWN
        ]
        cells = [
            f"`{name}`",
            *(f"{peak:.1f}" for peak in peaks),
            f"{sum(plan.disk.values()) / 2**30:.1f}",
            *hours,
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

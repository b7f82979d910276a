"""The tables of docs/results.md: what the paper shows, what it leaves open, on the toy teacher.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --table figure5 --jobs 2
    python benchmarks/paper_report.py                       # tables and curves of what is done

runs.py says how runs are made and kept. All of this takes days on a CPU.

RAPM here is preset ``toy-paper``, the paper's own regime, with a student of rank 16: 1,000
trajectories, M = 25, N = 4, both losses, two discriminators, 20,000 iterations of both kinds.

What chooses between settings (``open``, and ``steps`` beside it) is scored on the validation
captions, everything else on the test captions. The package ships no reference of the former:
``python tools/toy/score.py --split validation`` makes it, in hours on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

import runs
from runs import Spec

SEEDS = (0, 1, 2)
RANK_16 = "student.rank=16"
NO_DISCRIMINATORS = "discriminators.adversarial_weight=0"
RELATIVE_ONLY, ABSOLUTE_ONLY = "rapm.absolute_weight=0", "rapm.relative=false"
LONG = tuple(range(2_000, 20_001, 2_000))  # the paper's length, with a curve
VISITS = 20  # iterations a trajectory: 10 of the student's, as the paper's 20,000 are for 1,000
EQUAL_UPDATES = 6_000
RATES = (1e-4, 5e-4, 2e-3)  # PCM's


def rapm(name: str, *settings: str, score_at: tuple[int, ...] = LONG) -> Spec:
    """RAPM with some settings changed."""
    return Spec(name, settings=(RANK_16, *settings), score_at=score_at)


def seeds(*specs: Spec) -> list[Spec]:
    """All of them with the first seed, then with the next."""
    return [replace(spec, seed=seed) for seed in SEEDS for spec in specs]


RAPM = rapm("RAPM")


def figure5() -> list[Spec]:
    """The paper's Figure 5: FID along the iterations, at batch size 1, beside PCM and others.

    PCM and LCM learn from pictures: one trajectory is enough for what a store says besides. Their
    solver takes 40 steps, near the 50 that are published. PCM's discriminator learns at twice the
    student's rate, as its authors have it.
    """
    of_pictures = (RANK_16, "trajectories.count=1", "trajectories.fine_steps=10")
    phased = [
        Spec(
            f"PCM, rate {rate:g}",
            "pcm",
            (
                *of_pictures,
                f"student.learning_rate={rate}",
                f"discriminators.learning_rate={2 * rate}",
            ),
            score_at=LONG,
        )
        for rate in RATES
    ]
    midpoint = Spec("midpoint", "midpoint", score_at=LONG)
    rank_1 = Spec("RAPM, rank 1", score_at=LONG)
    regression = Spec("regression", "regression", (RANK_16,), score_at=LONG)
    lcm = Spec("LCM", "lcm", of_pictures, score_at=LONG)
    return [*seeds(RAPM, midpoint, *phased), rank_1, regression, lcm]


def figure3() -> list[Spec]:
    """The paper's Figure 3: which losses, with and without discriminators; and the two detaches.

    Without discriminators every iteration is the student's: 10,000 iterations are then as many
    updates as 20,000 with them, and both are scored.
    """
    terms = [RAPM, rapm("relative only", RELATIVE_ONLY), rapm("absolute only", ABSOLUTE_ONLY)]
    alone = [
        replace(
            spec,
            name=f"{spec.name}, no discriminators",
            settings=(*spec.settings, NO_DISCRIMINATORS),
        )
        for spec in terms
    ]
    detaches = [
        rapm("first detach off", "rapm.detach_relative=false"),
        rapm("second detach off", "rapm.detach_slots=false"),
    ]
    return [*seeds(*terms), *alone, *detaches]


def quarter(what: str, *settings: str) -> Spec:
    """A quarter of the trajectories and of the iterations."""
    name = f"quarter, {what}" if what else "quarter"
    spec = rapm(name, "trajectories.count=256", *settings, score_at=(2_500, 5_000))
    return replace(spec, split="validation")


QUARTER = replace(quarter(""), steps=(1, 2, 4, 8))


def open_questions() -> list[Spec]:
    """What the paper leaves open, one at a time; the defaults are :data:`QUARTER`'s.

    Where discriminators learn jointly, 2,500 iterations are as many updates as 5,000 by turns.
    """
    changes = {
        "joint": ["discriminators.schedule=joint"],
        "relativistic, shared noise, adaptive weight": [
            "discriminators.loss=relativistic",
            "discriminators.noise=shared",
            "discriminators.weighting=adaptive",
        ],
        "ema 0.99": ["student.ema=0.99"],
    }
    for key, values in {
        "discriminators.adversarial_weight": (0.05, 0.5),
        "rapm.absolute_weight": (0.1, 0.5, 2),
        "rapm.delta": (2, 5),
        "trajectories.guidance_scale": (3, 5),
        "discriminators.learning_rate": (5e-5, 2e-4),
    }.items():
        words = key.replace("discriminators.learning_rate", "discriminators' rate")
        changes |= {
            f"{words.split('.')[-1].replace('_', ' ')} {value:g}": [f"{key}={value}"]
            for value in values
        }
    return [*seeds(QUARTER), *(quarter(what, *own) for what, own in changes.items())]


def steps() -> list[Spec]:
    """Students of N = 1, 2, 4 and 8 steps; a slot's fine steps as many as make 100, or nearly."""
    others = [
        quarter(f"N = {n}", f"trajectories.slots={n}", f"trajectories.fine_steps={m}")
        for n, m in ((1, 100), (2, 50), (8, 12))
    ]
    return [QUARTER, *others]


def trajectories() -> list[Spec]:
    """How many trajectories, how accurate: at equal visits, and at equal updates."""
    specs = []
    for count in (16, 64, 256, 1000):
        for fine in (5, 10, 25, 50):
            spec = rapm(
                f"{count} trajectories, M = {fine}",
                f"trajectories.count={count}",
                f"trajectories.fine_steps={fine}",
                score_at=tuple(sorted((VISITS * count, EQUAL_UPDATES))),
            )
            specs.append(RAPM if (count, fine) == (1000, 25) else spec)
    return specs


TABLES = {
    "figure5": figure5(),
    "figure3": figure3(),
    "open": open_questions(),
    "steps": steps(),
    "trajectories": trajectories(),
}

if __name__ == "__main__":
    runs.main(TABLES, __file__)

"""The tables of docs/results.md: what the paper shows, what it leaves open, on the toy teacher.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --table rates --jobs 2
    python benchmarks/paper_report.py                       # tables and curves of what is done

runs.py says how runs are made and kept. A run takes an hour on a core, or two; all of this takes
days on a CPU.

RAPM here is preset ``toy-paper``, the paper's own regime, with a student of rank 16: M = 25, N = 4,
both losses, two discriminators by turns, each trajectory ten times in the student's turns. The
length is a quarter of the paper's: 256 trajectories, 5,000 iterations of both kinds. Table ``full``
has its 1,000 trajectories and 20,000 iterations.

Choices are made by scores on the validation captions; what is claimed is scored on the test
captions. ``python tools/toy/score.py --split validation`` made the reference of the former.
"""

from __future__ import annotations

from dataclasses import replace

import runs
from runs import Spec

SEEDS = (0, 1, 2)
RANK_16 = "student.rank=16"
NO_DISCRIMINATORS = "discriminators.adversarial_weight=0"
RELATIVE_ONLY, ABSOLUTE_ONLY = "rapm.absolute_weight=0", "rapm.relative=false"
COUNT, LENGTH, FULL_LENGTH = 256, 5_000, 20_000
CURVE, ENDS = tuple(range(1_000, LENGTH + 1, 1_000)), (LENGTH // 2, LENGTH)
VISITS = 20  # iterations a trajectory: 10 of the student's, as the paper's 20,000 are for 1,000
RATES = (2e-4, 5e-4, 1e-3)
# PCM and LCM learn from pictures: one trajectory is enough for what a store says besides. Their
# solver takes 40 steps, near the 50 that are published.
OF_PICTURES = (RANK_16, "trajectories.count=1", "trajectories.fine_steps=10")


def quarter(name: str, method: str, *settings: str) -> Spec:
    """A run of a quarter of the paper's length, scored on both captions."""
    return Spec(name, method, settings, iterations=LENGTH, test_at=CURVE, validation_at=ENDS)


def rapm_at(rate: float) -> Spec:
    """RAPM; the discriminators learn at the student's rate."""
    rates = f"student.learning_rate={rate}", f"discriminators.learning_rate={rate}"
    own = RANK_16, f"trajectories.count={COUNT}", *rates
    return quarter(f"RAPM, rate {rate:g}", "rapm", *own)


def pcm_at(rate: float) -> Spec:
    """PCM; its discriminator learns at twice the student's rate, as its authors have it."""
    rates = f"student.learning_rate={rate}", f"discriminators.learning_rate={2 * rate}"
    return quarter(f"PCM, rate {rate:g}", "pcm", *OF_PICTURES, *rates)


# The rates that everything below has; see table ``rates``.
RATE, PCM_RATE = 2e-4, 5e-4
RAPM, PCM = rapm_at(RATE), pcm_at(PCM_RATE)


def changed(what: str, *settings: str) -> Spec:
    """RAPM with some settings changed, for a choice: scored on the validation captions."""
    return replace(RAPM, name=what, settings=(*RAPM.settings, *settings), test_at=())


def shown(what: str, *settings: str) -> Spec:
    """RAPM with some settings changed, for a claim: scored on both."""
    return replace(changed(what, *settings), test_at=CURVE)


def seeds(*specs: Spec) -> list[Spec]:
    """All of them with the first seed, then with the next."""
    return [replace(spec, seed=seed) for seed in SEEDS for spec in specs]


def rates() -> list[Spec]:
    """The learning rates of RAPM and of PCM, each the best of three."""
    return [spec(rate) for rate in RATES for spec in (rapm_at, pcm_at)]


def figure5() -> list[Spec]:
    """The paper's Figure 5: FID along the iterations, at batch size 1, beside PCM and others."""
    midpoint = quarter("midpoint", "midpoint")
    regression = quarter("regression", "regression", *RAPM.settings)
    lcm = quarter("LCM", "lcm", *OF_PICTURES, f"student.learning_rate={PCM_RATE}")
    return [*seeds(RAPM, PCM, midpoint), shown("rank 1", "student.rank=1"), regression, lcm]


def full() -> list[Spec]:
    """RAPM and PCM at the paper's length."""
    places = tuple(range(2_000, FULL_LENGTH + 1, 2_000))
    return [
        replace(
            spec,
            name=f"{spec.name}, full length",
            settings=(*spec.settings, *own),
            iterations=FULL_LENGTH,
            test_at=places,
            validation_at=(),
        )
        for spec, own in ((RAPM, ("trajectories.count=1000",)), (PCM, ()))
    ]


def figure3() -> list[Spec]:
    """The paper's Figure 3: which losses, with and without discriminators; and the two detaches.

    Without discriminators every iteration is the student's: half of them are as many updates.
    """
    terms = [RAPM, shown("relative only", RELATIVE_ONLY), shown("absolute only", ABSOLUTE_ONLY)]
    alone = [
        replace(
            spec,
            name=f"{spec.name}, no discriminators",
            settings=(*spec.settings, NO_DISCRIMINATORS),
            iterations=LENGTH // 2,
            test_at=tuple(k // 2 for k in CURVE),
            validation_at=(LENGTH // 2,),
        )
        for spec in terms
    ]
    detaches = [
        shown("first detach off", "rapm.detach_relative=false"),
        shown("second detach off", "rapm.detach_slots=false"),
    ]
    return [*seeds(*terms), *alone, *detaches]


def open_questions() -> list[Spec]:
    """What the paper leaves open, one at a time; the defaults are :data:`RAPM`'s.

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
        "discriminators.learning_rate": (RATE / 2, RATE * 2),
    }.items():
        words = key.replace("discriminators.learning_rate", "discriminators' rate")
        changes |= {
            f"{words.split('.')[-1].replace('_', ' ')} {value:g}": [f"{key}={value}"]
            for value in values
        }
    return [*seeds(RAPM), *(changed(what, *own) for what, own in changes.items())]


def steps() -> list[Spec]:
    """Students of N = 1, 2, 4 and 8 steps; a slot's fine steps as many as make 100, or nearly."""
    return [RAPM] + [
        changed(f"N = {n}", f"trajectories.slots={n}", f"trajectories.fine_steps={m}")
        for n, m in ((1, 100), (2, 50), (8, 12))
    ]


def trajectories() -> list[Spec]:
    """How many trajectories, how accurate: at equal updates, and at equal visits."""
    specs = []
    for count in (16, 64, COUNT):
        for fine in (5, 10, 25, 50):
            own = f"trajectories.count={count}", f"trajectories.fine_steps={fine}"
            spec = changed(f"{count} trajectories, M = {fine}", *own)
            places = tuple(sorted({min(VISITS * count, LENGTH), LENGTH}))
            spec = replace(spec, validation_at=places)
            specs.append(RAPM if (count, fine) == (COUNT, 25) else spec)
    return specs


TABLES = {
    "rates": rates(),
    "figure5": figure5(),
    "figure3": figure3(),
    "open": open_questions(),
    "steps": steps(),
    "trajectories": trajectories(),
    "full": full(),
}

if __name__ == "__main__":
    runs.main(TABLES, __file__)

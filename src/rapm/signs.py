"""Signs that a run goes wrong, read off its metrics and samples: each with its cause and remedy.

The paper names some: dark or blurry pictures, structure that changes between iterations, a score
that fluctuates. They are looked for once a quarter or a half of the run is done; before, every
student is in motion. The limits lie well outside of what healthy runs of the toy teacher show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rapm.config import Config

Records = Sequence[Mapping[str, Any]]

QUIET_SHARE = 0.25  # of a run, at its beginning
FEWEST = 20  # updates that a judgement takes
LIMITS = {"brightness": (0.85, 1.18), "contrast": (0.8, 1.25), "sharpness": (0.5, 2.0)}
TOO_FAST = "a learning rate that is too high", "half of student.learning_rate"
BELOW = {
    "brightness": ("darker", *TOO_FAST),
    "contrast": ("paler", *TOO_FAST),
    "sharpness": (
        "blurrier",
        "a student that learns the mean of several pictures; distances alone do that",
        "longer training, or with method rapm a larger discriminators.adversarial_weight",
    ),
}
ABOVE = {
    "brightness": ("brighter", *TOO_FAST),
    "contrast": ("harder in contrast", *TOO_FAST),
    "sharpness": (
        "grainier",
        "an adversarial term that is too strong, or a learning rate that is too high",
        "half of student.learning_rate, or with method rapm of discriminators.adversarial_weight",
    ),
}
MOVED = 0.4  # of the distance between different prompts, from the middle of a run on
CHANCE = 1.0  # standard errors that a margin has to be above zero
SATURATED = 0.1  # of the hinge loss of a discriminator that tells nothing apart, which is 2
AT_THE_CLIP = 0.95  # of the updates
STALLED = 0.97  # of the distance at the beginning


@dataclass(frozen=True)
class Sign:
    """Something that goes wrong.

    Attributes:
        name: of its kind, for records.
        seen: what was measured.
        cause: what this mostly comes from.
        remedy: what to try, with settings.
    """

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.seen}. Likely cause: {self.cause}. Try: {self.remedy}"


def find_signs(config: Config, metrics: Records, samples: Records) -> list[Sign]:
    """All that a run shows by now.

    Args:
        metrics: its records of iterations, see :meth:`rapm.run.Run.read_metrics`.
        samples: its records of samples, see :meth:`rapm.run.Run.read_samples`.
    """
    share = (metrics[-1]["iteration"] + 1 if metrics else 0) / config.training.iterations
    looks = (_pictures, _scores, _clipped) if share >= QUIET_SHARE else ()
    looks += (_jumps, _discriminators, _slow) if share >= 0.5 else ()
    found = [*_without_gradient(metrics)]
    for look in looks:
        found += look(config, metrics, samples)
    return found


def _pictures(config: Config, metrics: Records, samples: Records) -> Iterator[Sign]:
    """Darker, paler or blurrier than the teacher's, twice in a row."""
    for name, (least, most) in LIMITS.items():
        values = [record[name] for record in samples[-2:] if name in record]
        below, above = max(values, default=most) < least, min(values, default=least) > most
        if len(values) < 2 or not (below or above):
            continue
        word, cause, remedy = BELOW[name] if below else ABOVE[name]
        seen = f"pictures are {word} than the teacher's: {name} is {values[-1]:.2f} of it"
        yield Sign(word, seen, cause, remedy)


def _jumps(config: Config, metrics: Records, samples: Records) -> Iterator[Sign]:
    """Structure that changes between samples, in the second half."""
    half = config.training.iterations / 2
    late = [r["moved"] for r in samples if r["iteration"] > half and "moved" in r][-2:]
    if len(late) == 2 and min(late) > MOVED:
        absolute = config.method == "rapm" and not any(
            config.slot_weights(config.rapm.absolute_weight)
        )
        yield Sign(
            "jumps",
            f"what is where changes from sample to sample, by {late[-1]:.2f} of the distance "
            "between different prompts",
            "no absolute loss" if absolute else "a learning rate that is too high",
            "rapm.absolute_weight = 1"
            if absolute
            else "half of student.learning_rate, or student.ema = 0.99",
        )


def _scores(config: Config, metrics: Records, samples: Records) -> Iterator[Sign]:
    """A score that rises again, or that goes up and down."""
    fids = [record["fid"] for record in samples if "fid" in record][1:]
    if len(fids) >= 4 and fids[-1] > 1.5 * min(fids) and fids[-2] > 1.25 * min(fids):
        yield Sign(
            "score rises",
            f"FID is {fids[-1]:.3f}, after {min(fids):.3f}",
            "the student has left the teacher: too many visits to too few trajectories, or a rate "
            "that is too high",
            "more trajectories.count, fewer training.iterations, or training.decay = 0.5",
        )
    steps = [b / a for a, b in zip(fids[-5:], fids[-4:], strict=False)]
    if len(steps) == 4 and max(steps) > 1.4 and min(steps) < 1 / 1.4:
        yield Sign(
            "score fluctuates",
            f"FID goes up and down, from {min(fids[-5:]):.3f} to {max(fids[-5:]):.3f}",
            "updates that are too large for batch size 1",
            "half of student.learning_rate, or student.ema = 0.99",
        )


def _discriminators(config: Config, metrics: Records, samples: Records) -> Iterator[Sign]:
    """A discriminator that cannot tell student from target, or always can."""
    for term in ("relative", "absolute"):
        margins, losses = (
            _late([r[f"{term}_{what}"] for r in metrics if f"{term}_{what}" in r], 2)
            for what in ("margin", "discriminator")
        )
        if not margins:
            continue
        error = statistics.stdev(margins) / math.sqrt(len(margins))
        mean = statistics.mean(margins)
        if mean < CHANCE * error:
            yield Sign(
                f"{term} discriminator at chance",
                f"the {term} discriminator cannot tell the student from its target: its margin is "
                f"{mean:.3f} +- {error:.3f}",
                "a student that is as good as its target, or a discriminator that learns too "
                "slowly; its term is noise then",
                "twice discriminators.learning_rate, or discriminators.adversarial_weight = 0",
            )
        if config.discriminators.loss == "hinge" and statistics.mean(losses) < 2 * SATURATED:
            yield Sign(
                f"{term} discriminator saturated",
                f"the {term} discriminator always tells the student from its target: its loss is "
                f"{statistics.mean(losses):.3f}, where chance is 2",
                "a discriminator that learns faster than the student",
                "half of discriminators.learning_rate",
            )


def _clipped(config: Config, metrics: Records, samples: Records) -> Iterator[Sign]:
    """The student's gradient. A discriminator's is of its heads' making; AdamW divides it out."""
    norms = _late([r["student_gradient"] for r in metrics if "student_gradient" in r])
    clip = config.training.gradient_clip
    if norms and sum(norm > 2 * clip for norm in norms) > AT_THE_CLIP * len(norms):
        yield Sign(
            "clipped",
            f"the student's gradient is far beyond the clip all along: {statistics.mean(norms):.2f}"
            f" in the mean, clipped at {clip:g}",
            "losses of an unusual size, from their weights or the number of slots",
            "training.gradient_clip near that mean",
        )


def _slow(config: Config, metrics: Records, samples: Records) -> Iterator[Sign]:
    """Distances that do not fall."""
    for name in ("absolute_distance", "relative_distance", "distance"):
        values = [record[name] for record in metrics if name in record]
        first, late = values[: max(FEWEST, len(values) // 10)], _late(values)
        if late and statistics.mean(late) > STALLED * statistics.mean(first):
            yield Sign(
                f"{name.replace('_', ' ')} does not fall",
                f"the {name.replace('_', ' ')} does not fall: {statistics.mean(late):.3f}, after "
                f"{statistics.mean(first):.3f} at the beginning",
                "a learning rate that is too low or far too high, or a LoRA that reaches too few "
                "layers",
                "student.learning_rate twice and half of what it is, in short runs; student.rank",
            )


def _without_gradient(metrics: Records) -> Iterator[Sign]:
    names = {name for record in metrics[:FEWEST] for name in record if name.endswith("_gradient")}
    for name in sorted(names):
        last = [record[name] for record in metrics if name in record][-FEWEST:]
        if len(last) == FEWEST and not any(last):
            adapter = name.removesuffix("_gradient").replace("_", " ")
            yield Sign(
                f"no gradient for the {adapter}",
                f"the {adapter} had no gradient for {FEWEST} updates: it learns nothing",
                "weights of losses that are 0, or targets that the network does not use",
                "other LoRA targets, or losses that are not 0",
            )


def _late(values: Sequence[float], share: int = 4) -> Sequence[float]:
    """The last quarter, or another share; nothing where that are too few to judge by."""
    return values[-max(FEWEST, len(values) // share) :] if len(values) >= FEWEST else ()

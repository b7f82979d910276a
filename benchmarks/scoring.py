"""Scores of a student that trains, by the toy data set's protocol, and what its run has taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from baselines import Baseline
from rapm.errors import NonFinite
from rapm.evaluate import toy as protocol
from rapm.methods import Method
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER
from rapm.sample import Sampler
from rapm.sampling import guided, repeat
from rapm.toy import ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import Split
from rapm.trajectories import TrajectoryStore

SIDE_BY_SIDE = 50  # pictures


def scorer(method: Method, teacher: Teacher, split: Split) -> Callable[[int], dict[str, float]]:
    """What scores the student as it stands: ``(num_steps) -> scores``.

    FID is to the teacher's pictures of 100 steps at guidance 7.5, whatever guidance a run has.
    ``fid_interval`` is half of its 95 % interval.

    Raises:
        NonFinite: by the returned function, of a student whose pictures are no numbers.
    """
    stochastic = isinstance(method, Baseline) and method.stochastic
    sampler = Sampler(
        teacher,
        method.backbone,
        guidance_scale=method.config.trajectories.guidance_scale,
        batch_size=SIDE_BY_SIDE,
        scheduler="lcm" if stochastic else "ddim",
    )
    oracle = Oracle.load(ORACLE)

    def scores(num_steps: int) -> dict[str, float]:
        many = protocol.load_reference(split)[protocol.MANY_STEPS]
        with method.student.averaged():
            measured = protocol.measure(sampler, oracle, STUDENT, num_steps, split)
        if not measured.first.isfinite().all():
            raise NonFinite("the student's pictures are not finite")
        scores = protocol.compared(measured, many)
        interval = scores["fid"].high - scores["fid"].value
        return {name: s.value for name, s in scores.items()} | {"fid_interval": interval}

    return scores


@torch.no_grad()
def rollout_seconds(method: Method, store: TrajectoryStore) -> float:
    """What the rollout of a method's trajectories takes, by three timed passes of the teacher."""
    own, grid, backbone = method.config.trajectories, method.grid, method.backbone
    if not method.stores_positions:
        return 0.0
    row, size, taken = store[0], min(own.batch_size, own.count), []
    z = row.absolute[-1:].repeat(size, 1, 1, 1).to(backbone.device)
    prompts = repeat({name: value[None] for name, value in row.conditioning.items()}, size)
    network = guided(backbone, store.unconditional, own.guidance_scale)
    with backbone.adapter(TEACHER):
        for _ in range(4):
            started = time.perf_counter()
            network(z, torch.full((size,), 500), prompts).cpu()
            taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:]) * grid.slots * grid.fine_steps * own.count / size

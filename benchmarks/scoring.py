"""Scores of a student that trains, by the toy data set's protocol, and what its run has taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from baselines import Baseline, with_noise
from rapm.errors import NonFinite
from rapm.evaluate import toy as protocol
from rapm.evaluate.metrics import frechet_distance
from rapm.methods import Method
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER
from rapm.sample import Sampler
from rapm.sampling import guided, picture_noise, repeat, seeded
from rapm.schedule import trailing_timesteps
from rapm.toy import ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import Split
from rapm.trajectories import TrajectoryStore

SIDE_BY_SIDE = 50  # pictures
BOOTSTRAP = 20


class StochasticSampler(Sampler):
    """Samples as LCM and DMD2 do: predicts the clean latent and adds noise again.

    That noise is a function of the picture's seed and the step.
    """

    @torch.no_grad()
    def latents(
        self,
        adapter: str,
        prompts: Sequence[str],
        seeds: Iterable[int],
        num_steps: int,
        batch_size: int | None = None,
    ) -> Tensor:
        schedule, device, seeds = self.teacher.schedule, self.backbone.device, list(seeds)
        conditioning, _ = self.encode(prompts)
        z = torch.stack([picture_noise(seed, self.shape) for seed in seeds]).to(device)
        with self.backbone.adapter(adapter):
            for k, (t, s) in enumerate(pairwise(trailing_timesteps(num_steps))):
                prediction = self.backbone(z, torch.full((len(z),), t), conditioning)
                z, _ = schedule.x0_and_eps(z, prediction, t)
                if s >= 0:
                    own = [seeded(f"consistency sampling {seed} {k}") for seed in seeds]
                    noise = torch.stack([torch.randn(self.shape, generator=g) for g in own])
                    z = with_noise(schedule, z, s, noise.to(device))
        return z


def scorer(method: Method, teacher: Teacher, split: Split) -> Callable[[int], dict[str, float]]:
    """What scores the student as it stands: ``(num_steps) -> scores``.

    FID is to the teacher's pictures of 100 steps at guidance 7.5, whatever guidance a run has.
    ``fid_deviation`` is by a bootstrap over captions.

    Raises:
        NonFinite: by the returned function, of a student whose pictures are no numbers.
    """
    stochastic = isinstance(method, Baseline) and method.stochastic
    sampler = (StochasticSampler if stochastic else Sampler)(
        teacher,
        method.backbone,
        guidance_scale=method.config.trajectories.guidance_scale,
        batch_size=SIDE_BY_SIDE,
    )
    oracle = Oracle.load(ORACLE)

    def scores(num_steps: int) -> dict[str, float]:
        many = protocol.load_reference(split)[protocol.MANY_STEPS]
        with method.student.averaged():
            measured = protocol.measure(sampler, oracle, STUDENT, num_steps, split)
        if not measured.first.isfinite().all():
            raise NonFinite("the student's pictures are not finite")
        generator, n = torch.Generator().manual_seed(0), len(measured.first)
        again = [torch.randint(n, (n,), generator=generator) for _ in range(BOOTSTRAP)]
        fids = [frechet_distance(measured.first[rows], many.second) for rows in again]
        return protocol.compared(measured, many) | {"fid_deviation": statistics.stdev(fids)}

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

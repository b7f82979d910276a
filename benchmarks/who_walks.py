"""Which slots of a trained student lose captions? ``python benchmarks/who_walks.py RUN [--walks
SSSS 5SSS ...]``.

A walk says who goes each slot, the first (of high noise) first: S is the student's one step, a
number so many guided steps of the teacher's, F the step that relayed training asks for, solved
instead of learnt, in many of the teacher's passes. All walks start from the same noise with the
same validation captions of the embedded world. Prints for each the share of pictures that are
    right: of all, and of those with 1, 2 and 3 objects.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rapm.evaluate.toy import CAPTION_SEED, CAPTIONS, SEEDS
from rapm.network import STUDENT, TEACHER
from rapm.objective import Conditioning, Denoiser, follow, student_step
from rapm.run import Run
from rapm.sample import Studio, open_studio
from rapm.schedule import Grid, Schedule
from rapm.toy import ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import captions, parse_caption
from rapm.trajectories import guided, picture_noise

BATCH = 50
ROUNDS, DAMPING = (
    12,
    0.4,
)  # undamped, more rounds read worse; after these it moves by 0.02 and less where a slot moves by 2


@torch.no_grad()
def solved(
    teacher: Denoiser,
    schedule: Schedule,
    grid: Grid,
    slot: int,
    z: Tensor,
    end: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Where a step from z leads that agrees with its own relay, sought from one that leads to
    ``end``, all [B, C, H, W].

    The student of relayed training stands still where the teacher, who takes over delta fine steps
    down the student's step, arrives where that step leads. That is one equation for each picture,
    and needs no student to be solved.
    """
    t, m, s = grid.coarse(slot + 1), grid.nudged(slot), grid.coarse(slot)
    (a_t, a_m, a_s), (s_t, s_m, s_s) = (
        [table(time, z) for time in (t, m, s)] for table in (schedule.alpha, schedule.sigma)
    )
    determinant = a_t * s_s - s_t * a_s
    for _ in range(ROUNDS):
        x0, eps = (s_s * z - s_t * end) / determinant, (a_t * end - a_s * z) / determinant
        arrived = follow(
            teacher, schedule, grid, [slot], a_m * x0 + s_m * eps, conditioning, nudged=True
        )[1]
        end = end + DAMPING * (arrived - end)
    return end


@torch.no_grad()
def walk(
    studio: Studio,
    grid: Grid,
    who: str,
    z: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
) -> Tensor:
    """Where ``who``, a letter a slot, gets from noise z [B, C, h, w]; ``grid`` is the run's."""
    network, schedule = studio.backbone, studio.teacher.schedule
    teacher, end = guided(network, unconditional, studio.guidance_scale), z
    for n, walker in zip(reversed(range(len(who))), who, strict=True):
        if walker in "SF":
            with network.role(STUDENT):
                end = student_step(network, schedule, grid, [n], z, conditioning)
        with network.role(TEACHER):
            if walker == "F":
                end = solved(teacher, schedule, grid, n, z, end, conditioning)
            elif walker != "S":
                end = follow(
                    teacher, schedule, Grid(len(who), int(walker), 1), [n], z, conditioning
                )[1]
        z = end
    return z


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    usual = ["SSSS", "5SSS", "55SS", "555S", "5555", "S555", "SS55", "SSS5"]
    parser.add_argument("--walks", nargs="*", default=usual, metavar="WHO")
    parser.add_argument("--captions", type=int, default=600)
    arguments = parser.parse_args()
    run = Run.existing(arguments.run)
    studio, oracle, grid = open_studio(run), Oracle.load(ORACLE), run.config.grid()
    texts = captions(CAPTIONS, CAPTION_SEED, "validation")[: arguments.captions]
    objects = torch.tensor([len(parse_caption(text)[1]) for text in texts])
    conditioning, unconditional = studio.encode(texts)
    noise = torch.stack(
        [picture_noise(SEEDS["first"] + i, studio.shape) for i in range(len(texts))]
    )
    for who in arguments.walks:
        right = []
        for first in range(0, len(texts), BATCH):
            rows = slice(first, first + BATCH)
            own = {name: value[rows] for name, value in conditioning.items()}
            images = studio.decode(walk(studio, grid, who, noise[rows], own, unconditional))
            right.append(oracle.is_right(images, texts[rows]).float())
        share = torch.cat(right)
        by_objects = ", ".join(f"{float(share[objects == n].mean()):.3f}" for n in (1, 2, 3))
        print(f"{who}: {float(share.mean()):.3f} ({by_objects})", flush=True)


if __name__ == "__main__":
    main()

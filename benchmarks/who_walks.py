"""Which slots of a trained student lose captions? ``python benchmarks/who_walks.py RUN [--walks SSSS 5SSS ...]``.

A walk says who goes each slot, the first (of high noise) first: S is the student's one step, a number so many guided steps of
the teacher's. All walks start from the same noise with the same validation captions of the embedded world. Prints for each the
share of pictures that are right, of all and of those with 1, 2 and 3 objects.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from rapm.evaluate.toy_protocol import CAPTION_SEED, CAPTIONS, SEEDS
from rapm.network import STUDENT, TEACHER
from rapm.objective import Conditioning, follow, student_step
from rapm.run import Run
from rapm.sample import Studio, open_studio
from rapm.schedule import Grid
from rapm.toy import ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import captions, parse_caption
from rapm.trajectories import guided, picture_noise

BATCH = 50


@torch.no_grad()
def walk(studio: Studio, who: str, z: Tensor, conditioning: Conditioning, unconditional: Conditioning) -> Tensor:
    """Where ``who``, a letter a slot, gets from noise z [B, C, h, w]."""
    network, schedule = studio.backbone, studio.teacher.schedule
    for n, walker in zip(reversed(range(len(who))), who, strict=True):
        with network.role(STUDENT if walker == "S" else TEACHER):
            if walker == "S":
                z = student_step(network, schedule, Grid(len(who), 1, 1), [n], z, conditioning)
            else:
                teacher = guided(network, unconditional, studio.guidance_scale)
                z = follow(teacher, schedule, Grid(len(who), int(walker), 1), [n], z, conditioning)[1]
    return z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    usual = ["SSSS", "5SSS", "55SS", "555S", "5555", "S555", "SS55", "SSS5"]
    parser.add_argument("--walks", nargs="*", default=usual, metavar="WHO")
    parser.add_argument("--captions", type=int, default=600)
    arguments = parser.parse_args()
    studio, oracle = open_studio(Run.existing(arguments.run)), Oracle.load(ORACLE)
    texts = captions(CAPTIONS, CAPTION_SEED, "validation")[: arguments.captions]
    objects = torch.tensor([len(parse_caption(text)[1]) for text in texts])
    conditioning, unconditional = studio.encode(texts)
    noise = torch.stack([picture_noise(SEEDS["first"] + i, studio.shape) for i in range(len(texts))])
    for who in arguments.walks:
        right = []
        for first in range(0, len(texts), BATCH):
            rows = slice(first, first + BATCH)
            own = {name: value[rows] for name, value in conditioning.items()}
            images = studio.decode(walk(studio, who, noise[rows], own, unconditional))
            right.append(oracle.is_right(images, texts[rows]).float())
        share = torch.cat(right)
        by_objects = ", ".join(f"{float(share[objects == n].mean()):.3f}" for n in (1, 2, 3))
        print(f"{who}: {float(share.mean()):.3f} ({by_objects})", flush=True)


if __name__ == "__main__":
    main()

"""Measures the embedded teacher and writes the reference that evaluations compare with: ``python -m rapm.toy.score``.

Prints, for the split's captions: caption accuracy at 100 steps; FID between two sets of 100-step pictures from different
seeds (the floor); FID at few steps and its ratio to the floor.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch

from rapm import config as configuration
from rapm.evaluate import toy_protocol as protocol
from rapm.evaluate.metrics import frechet_distance
from rapm.files import save_tensors, write_json
from rapm.network import TEACHER
from rapm.progress import track
from rapm.run import Run
from rapm.sample import Studio, open_studio
from rapm.toy import ASSETS, ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import Split, captions, parse_caption


def _open() -> tuple[Studio, Oracle]:
    return open_studio(Run(Path("."), configuration.load(teacher="toy")), student=False), Oracle.load(ORACLE)


def _draw_alone(split: Split, job: protocol.Job) -> protocol.Drawn:
    """One batch, on one thread, in a process that keeps its teacher."""
    torch.set_num_threads(1)
    studio, oracle = _kept()
    return protocol.draw(studio, oracle, TEACHER, protocol.REFERENCE_STEPS, split, job)


_kept = cache(_open)


def make_reference(split: Split) -> None:
    """Writes ``reference-<split>.safetensors``. On a CPU two processes of one thread beat one process of two."""
    todo = protocol.jobs(split, protocol.CAPTIONS[split])
    with ProcessPoolExecutor(1 if torch.cuda.is_available() else None, get_context("spawn")) as pool:
        drawn = list(track(pool.map(_draw_alone, [split] * len(todo), todo), "reference", total=len(todo)))
    tensors = asdict(protocol.gather(list(zip(todo, drawn, strict=True))))
    save_tensors(protocol.reference_file(split), {name: value.half() for name, value in tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--few", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of steps to measure beside 100")
    split: Split = (arguments := parser.parse_args()).split
    started = time.monotonic()
    if not protocol.reference_file(split).is_file():
        make_reference(split)
    teacher = protocol.load_reference(split)
    floor = frechet_distance(teacher.first, teacher.second)
    studio, oracle = _open()
    counts = [len(parse_caption(text)[1]) for text in captions(protocol.CAPTIONS[split], protocol.CAPTION_SEED, split)]
    by_count = {n: float(teacher.right[torch.tensor(counts) == n].mean()) for n in sorted(set(counts))}
    figures = {
        "split": split,
        "guidance_scale": studio.guidance_scale,
        "caption_accuracy": float(teacher.right.mean()),
        "caption_accuracy_by_count": by_count,
        "fid_floor": floor,
        "few_steps": {},
    }
    for steps in arguments.few:
        measured = protocol.measure(studio, oracle, TEACHER, steps, split)
        fid = frechet_distance(measured.first, teacher.second)
        accuracy = float(measured.right.mean())
        figures["few_steps"][steps] = {"fid": fid, "over_floor": fid / floor, "caption_accuracy": accuracy}
    figures["seconds"] = round(time.monotonic() - started)
    write_json(ASSETS / f"figures-{split}.json", figures)
    print((ASSETS / f"figures-{split}.json").read_text())


if __name__ == "__main__":
    main()

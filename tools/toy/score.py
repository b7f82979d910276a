"""Measures the embedded teacher and writes the reference that evaluations compare with:
``python tools/toy/score.py``.

Prints, for the split's captions: caption accuracy at 100 steps; FID between two sets of 100-step
pictures from different seeds (the floor); FID at few steps and its ratio to the floor; scores at
few steps and lower guidance, which so few steps bear better. What was measured before of the same
teacher stays.
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from rapm import settings
from rapm.evaluate import toy as protocol
from rapm.evaluate.metrics import frechet_distance
from rapm.io import load_tensors, save_tensors, sha256, write_json
from rapm.network import TEACHER
from rapm.progress import track
from rapm.run import Run
from rapm.sample import Sampler, open_sampler
from rapm.toy import GUIDANCE_SCALE, ORACLE
from rapm.toy import TEACHER as TEACHER_FOLDER
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import Split, captions, parse_caption


def _open() -> tuple[Sampler, Oracle]:
    run = Run(Path("."), settings.load(teacher="toy"))
    return open_sampler(run, student=False), Oracle.load(ORACLE)


_DRAWN = ("features", "right", "sharp")
_kept = cache(_open)


def _draw_alone(split: Split, parts: Path, steps: int, job: protocol.Job) -> protocol.Drawn:
    """One batch, on one thread, in a process that keeps its teacher; kept in a file, so that a stop
    loses little."""
    file = parts / f"{steps}-{job[0]}-{job[1]}.safetensors"
    if not file.is_file():
        torch.set_num_threads(1)
        sampler, oracle = _kept()
        save_tensors(
            file,
            dict(
                zip(_DRAWN, protocol.draw(sampler, oracle, TEACHER, steps, split, job), strict=True)
            ),
        )
    tensors = load_tensors(file)
    return tensors["features"], tensors["right"], tensors["sharp"]


def make_reference(split: Split, parts: Path) -> None:
    """Writes ``reference-<split>.safetensors``. On a CPU two processes of one thread beat one
    process of two."""
    measured: dict[int, protocol.Measured] = {}
    with ProcessPoolExecutor(
        1 if torch.cuda.is_available() else None, get_context("spawn")
    ) as pool:
        for steps, pairs in (
            (protocol.MANY_STEPS, protocol.CAPTIONS),
            (protocol.FEW_STEPS, protocol.PAIRS),
        ):
            todo = protocol.jobs(pairs)
            drawn = track(
                pool.map(partial(_draw_alone, split, parts, steps), todo),
                f"{steps} steps",
                total=len(todo),
            )
            measured[steps] = protocol.gather(list(zip(todo, drawn, strict=True)))
    protocol.save_reference(split, measured[protocol.MANY_STEPS], measured[protocol.FEW_STEPS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument(
        "--few",
        type=int,
        nargs="*",
        default=[1, 2, 8],
        help="numbers of steps to measure beside 100 and 4",
    )
    parser.add_argument(
        "--lower",
        type=float,
        nargs="*",
        default=[3, 5],
        help="guidance scales to measure beside the card's",
    )
    parser.add_argument(
        "--lower-at",
        type=int,
        nargs="*",
        default=[4, 8],
        help="numbers of steps to measure these at",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".toy-build"), help="working folder; run again to go on"
    )
    split: Split = (arguments := parser.parse_args()).split
    if not protocol.reference_file(split).is_file():
        # Parts of another teacher or oracle must not be taken for this one's.
        weights = (*sorted(TEACHER_FOLDER.rglob("*.safetensors")), ORACLE)
        made_with = "-".join([*(sha256(file)[:6] for file in weights), f"{GUIDANCE_SCALE:g}"])
        make_reference(split, arguments.out / f"reference-{split}-{made_with}")
    reference = protocol.load_reference(split)
    teacher = reference[protocol.MANY_STEPS]
    floor = frechet_distance(teacher.first, teacher.second)
    sampler, oracle = _open()
    counts = [
        len(parse_caption(text)[1])
        for text in captions(protocol.CAPTIONS, protocol.CAPTION_SEED, split)
    ]
    by_count = {
        n: float(teacher.right[torch.tensor(counts) == n].mean()) for n in sorted(set(counts))
    }
    file = protocol.reference_file(split).with_name(f"figures-{split}.json")
    before = json.loads(file.read_text()) if file.is_file() else {}
    if not math.isclose(before.get("fid_floor", 0), floor, rel_tol=1e-3):  # of another teacher
        before = {}
    few = dict(before.get("few_steps", {}))
    for steps in {protocol.FEW_STEPS, *arguments.few} - {int(steps) for steps in few}:
        measured = reference.get(steps) or protocol.measure(sampler, oracle, TEACHER, steps, split)
        fid = frechet_distance(measured.first, teacher.second)
        few[str(steps)] = {
            "fid": fid,
            "over_floor": fid / floor,
            "captions": float(measured.right.mean()),
        }
    card, lower = sampler.guidance_scale, list(before.get("lower_guidance", []))
    known = {(row["steps"], row["guidance_scale"]) for row in lower}
    for steps, scale in set(product(arguments.lower_at, arguments.lower)) - known:
        sampler.guidance_scale = scale
        measured = protocol.measure(sampler, oracle, TEACHER, steps, split)
        scores = protocol.compared(measured, teacher).items()
        values = {name: score.value for name, score in scores}
        lower.append({"steps": steps, "guidance_scale": scale} | values)
    figures = {
        "split": split,
        "guidance_scale": card,
        "captions": float(teacher.right.mean()),
        "captions_by_count": by_count,
        "fid_floor": floor,
        "few_steps": dict(sorted(few.items(), key=lambda item: int(item[0]))),
        "lower_guidance": sorted(lower, key=lambda row: (row["steps"], row["guidance_scale"])),
    }
    write_json(file, figures)
    print(file.read_text())


if __name__ == "__main__":
    main()

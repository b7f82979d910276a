"""Everything that only a GPU can say, in one go of twelve minutes.

    python benchmarks/gpu.py --out FOLDER                  # stop it and go on as you like
    python benchmarks/gpu.py --out FOLDER --toy --minutes 3  # the toy teacher alone, on any machine

In order: the rate of a matrix product; cases of full_size.py with random weights, those that say
most first, in two thirds of the time; then runs of paper.py side by side. FOLDER has ``rate.json``,
``full_size.json``, ``paper.jsonl`` and ``paper/``, each written as results come. What is there is
not made again. ``full_size.py --table FOLDER/full_size.json`` makes docs/cost.md's tables of it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import full_size
from machine import processor, timed
from rapm.io import write_json
from rapm.versions import versions

HERE = Path(__file__).parent
FIRST = ("RAPM", "midpoint", "PCM", "RAPM, no checkpointing, slot_batch 4", "RAPM, int8")
THEN = ("RAPM, compile", "RAPM, nf4", "midpoint, no checkpointing", "RAPM, slot_batch 4")
OF_FLOWS = ("RAPM", "midpoint")


def cases(toy: bool) -> Iterator[dict[str, Any]]:
    """Cases of full_size.py, those that say most first."""
    if toy:
        for name in full_size.TOY:
            yield {"model": "toy", "size": 64, "precision": "float32", "name": name}
        return
    stock, flows = (("sdxl", 1024), ("sd15", 512)), (("sd35-medium", 1024), ("z-image", 1024))
    for models, names in ((stock, FIRST), (flows, OF_FLOWS), (stock, THEN)):
        for name in names:
            for model, size in models:
                yield {"model": model, "size": size, "precision": "bfloat16", "name": name}


def rate(side: int, repeats: int = 10) -> dict[str, Any]:
    """TFLOP/s of the product of two square matrices: what a plan's share of peak is a share of."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    taken: list[float] = []
    for _ in range(repeats + 1):
        with timed(device, taken):
            a @ b
    best = 2 * side**3 / min(taken[1:]) / 1e12
    told = {"device": processor(), "dtype": str(dtype), "side": side, "versions": versions()}
    return told | {"teraflops": best}


def run_until(command: list[str], until: float) -> None:
    """A command, told to stop at a time of the monotonic clock; with all that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(max(until - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        for told, patience in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
            os.killpg(process.pid, told)
            try:
                process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                continue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--minutes", type=float, default=12, help="in all")
    parser.add_argument("--iterations", type=int, default=6, help="of each kind, in each case")
    parser.add_argument("--jobs", type=int, default=8, help="paper.py's runs side by side")
    parser.add_argument("--toy", action="store_true", help="the toy teacher alone")
    given = parser.parse_args()
    began, seconds = time.monotonic(), 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "rate.json").exists():
        write_json(given.out / "rate.json", rate(1024 if given.toy else 8192))
    until = began + seconds * 2 / 3
    file = given.out / "full_size.json"
    full_size.run_all(cases(given.toy), file, repeats=1, iterations=given.iterations, until=until)
    kept = ["--out", str(given.out / "paper"), "--results", str(given.out / "paper.jsonl")]
    command = [sys.executable, str(HERE / "paper.py"), "--jobs", str(given.jobs), *kept]
    run_until(command, began + seconds - 30)
    print(f"{time.monotonic() - began:.0f} s; {given.out} has what was found")


if __name__ == "__main__":
    main()

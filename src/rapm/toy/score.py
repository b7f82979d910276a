"""Measures the embedded teacher and writes the reference that evaluations compare with: ``python -m rapm.toy.score``.

Prints, for the split's captions: caption accuracy at 100 steps; FID between two sets of 100-step pictures from different
seeds (the floor); FID at few steps and its ratio to the floor.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from rapm import config as configuration
from rapm.evaluate import toy_protocol as protocol
from rapm.evaluate.metrics import frechet_distance
from rapm.files import load_tensors, save_tensors, write_json
from rapm.network import TEACHER
from rapm.progress import track
from rapm.run import Run
from rapm.sample import Studio, open_studio
from rapm.toy import ASSETS, ORACLE
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import Split, captions, parse_caption


def make_reference(studio: Studio, oracle: Oracle, split: Split) -> None:
    """Writes ``reference-<split>.safetensors``: the teacher's 100-step pictures as numbers."""
    teacher = protocol.measure(studio, oracle, TEACHER, protocol.REFERENCE_STEPS, split)
    texts = captions(protocol.CAPTIONS[split], protocol.CAPTION_SEED, split)
    seed = protocol.SEEDS["reference"]
    features = []
    for i in track(range(0, len(texts), 50), "reference"):
        images = studio.images(TEACHER, texts[i : i + 50], range(seed + i, seed + i + 50), protocol.REFERENCE_STEPS, 25)
        features.append(oracle.features(images))
    tensors = asdict(teacher) | {"reference": torch.cat(features)}
    save_tensors(protocol.reference_file(split), {name: value.half() for name, value in tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--few", type=int, nargs="*", default=[1, 2, 4, 8], help="numbers of steps to measure beside 100")
    split: Split = (arguments := parser.parse_args()).split
    studio = open_studio(Run(Path("."), configuration.load(teacher="toy")), student=False)
    oracle = Oracle.load(ORACLE)
    started = time.monotonic()
    if not protocol.reference_file(split).is_file():
        make_reference(studio, oracle, split)
    stored = {name: value.float() for name, value in load_tensors(protocol.reference_file(split)).items()}
    floor = frechet_distance(stored["first"], stored["reference"])
    counts = [len(parse_caption(text)[1]) for text in captions(protocol.CAPTIONS[split], protocol.CAPTION_SEED, split)]
    by_count = {n: float(stored["right"][torch.tensor(counts) == n].float().mean()) for n in sorted(set(counts))}
    figures = {
        "split": split,
        "guidance_scale": studio.guidance_scale,
        "caption_accuracy": float(stored["right"].float().mean()),
        "caption_accuracy_by_count": by_count,
        "fid_floor": floor,
        "few_steps": {},
    }
    for steps in arguments.few:
        measured = protocol.measure(studio, oracle, TEACHER, steps, split)
        fid = frechet_distance(measured.first, stored["reference"])
        accuracy = float(measured.right.float().mean())
        figures["few_steps"][steps] = {"fid": fid, "over_floor": fid / floor, "caption_accuracy": accuracy}
    figures["seconds"] = round(time.monotonic() - started)
    write_json(ASSETS / f"figures-{split}.json", figures)
    print((ASSETS / f"figures-{split}.json").read_text())


if __name__ == "__main__":
    main()

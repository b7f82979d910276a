"""Builds a second toy data set of more texture: the same scenes, all of them mottled.

    python benchmarks/textured.py --out .paper/textured

It goes on when run again. Patches of a latent's size are lighter or darker, each by itself. So a
picture holds a few hundred numbers of fine detail that no caption tells: what distances alone are
thought to blur. VAE, oracle and UNet start from the embedded ones. Runs in it are in
benchmarks/results/2026-11-small.jsonl; today's tables have none. It replaces names in
tools/toy/build.py, whose recipe it follows.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional as F

from rapm.io import write_text
from rapm.toy import ORACLE, TEACHER, scenes
from rapm.toy.oracle import Oracle
from rapm.toy.scenes import SIZE, Scene

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "toy"))
import build
from fit import Stage

PATCH = 4  # pixels: one of a latent
DEPTH = 0.2  # deviation of a patch's brightness
CAPTIONS = 1000  # for trajectories
SCENES, ORACLE_SCENES = 20_000, 10_000
RECIPE = {
    "vae": Stage(updates=1_000, batch=8, rate=1e-3),
    "oracle": Stage(updates=700, batch=48, rate=7e-4),
}
UNET_ROUNDS = {"unet": Stage(updates=2_400, batch=32, rate=4e-4)}


def mottle(scene: Scene) -> np.ndarray:
    """How much lighter or darker each pixel of a scene is, [64, 64], mean 0.

    It is a function of the scene's own texture.
    """
    rng = np.random.default_rng([int(u * 2**32) for u in scene.texture])
    patches = torch.from_numpy(
        rng.standard_normal((1, 1, SIZE // PATCH + 3, SIZE // PATCH + 3)).astype(np.float32)
    )
    smooth = F.interpolate(patches, scale_factor=PATCH, mode="bilinear")[0, 0].numpy()
    y, x = PATCH + rng.integers(0, PATCH, 2)
    return smooth[y : y + SIZE, x : x + SIZE]


def render_many(drawn: Iterator[Scene] | Sequence[Scene]) -> np.ndarray:
    """Mottled scenes, uint8 [n, 64, 64, 3]."""
    pictures = [scenes.render(scene) * (1 + DEPTH * mottle(scene)[..., None]) for scene in drawn]
    return np.stack([(picture.clip(0, 1) * 255 + 0.5).astype(np.uint8) for picture in pictures])


def oracle_to_train_on() -> Oracle:
    """The embedded one, its features not standardised."""
    oracle = Oracle.load(ORACLE).requires_grad_(True)
    oracle.feature_mean.zero_()
    oracle.feature_std.fill_(1)
    return oracle


def use_texture() -> None:
    """Puts these pictures, first weights and a shorter recipe in the place of the embedded ones."""
    build.render_many = render_many
    build.SCENES, build.ORACLE_SCENES = SCENES, ORACLE_SCENES
    build.RECIPE, build.UNET_ROUNDS = RECIPE, UNET_ROUNDS
    build.new_vae = lambda: AutoencoderKL.from_pretrained(
        TEACHER / "vae", torch_dtype=torch.float32
    )
    build.new_unet = lambda: UNet2DConditionModel.from_pretrained(
        TEACHER / "unet", torch_dtype=torch.float32
    )
    build.Oracle = oracle_to_train_on


use_texture()  # in the processes that render, too


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for part in ("tokenizer", "text_encoder"):  # captions are the same
        shutil.copytree(TEACHER / part, arguments.out / part, dirs_exist_ok=True)
    build.build(arguments.out, arguments.device)
    write_text(
        arguments.out / "captions.txt",
        "\n".join(scenes.captions(CAPTIONS, build.SEED, "train")) + "\n",
    )


if __name__ == "__main__":
    main()

"""Our FID beside clean-fid's own, on the same pictures and by the same network.

    python benchmarks/cleanfid.py          # minutes; clean-fid goes into a temporary folder

NVIDIA's Inception is not downloaded: a TorchScript file with the same interface stands for it,
2,048 features of random weights. Everything else is clean-fid's: files, resize, batches, statistics
and the matrix root by scipy. Writes benchmarks/results/cleanfid.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rapm.evaluate.captions import open_picture
from rapm.evaluate.features import INCEPTION, Inception
from rapm.evaluate.metrics import frechet_distance
from rapm.io import write_json
from rapm.progress import track
from rapm.versions import versions

PACKAGES = ("clean-fid==0.1.35", "scipy==1.17.1", "requests==2.34.2", "torchvision==0.28.0")
PICTURES, FEATURES, BATCH = 2_500, 2_048, 50
# torchvision registers operators of its compiled part when it is imported. That part is built for
# CUDA and does not load here; clean-fid needs none of them.
THEIRS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
own = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    own.define(name + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
from cleanfid import fid, inception_torchscript
inception_torchscript.check_download_inception = lambda fpath: None
real = torch.jit.load
torch.jit.load = lambda path: real(sys.argv[2])
print(fid.compute_fid(*sys.argv[3:5], mode="clean", num_workers=0, device=torch.device("cpu"),
                      use_dataparallel=False, verbose=False))
"""


class StandIn(nn.Module):
    """As much of NVIDIA's file as clean-fid asks for in its own mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.AdaptiveAvgPool2d(32), nn.Flatten(), nn.Linear(3 * 32**2, FEATURES), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def draw(folder: Path, seed: int, brightness: int) -> None:
    """Random pictures of many sizes, smaller and larger than 299 pixels."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for k in range(PICTURES):
        rows, columns = rng.integers(4, 40, 2)
        coarse = rng.integers(0, brightness, (rows, columns, 3), dtype=np.uint8)
        width, height = (int(side) for side in rng.integers(100, 400, 2))
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{k:05d}.png")


def features(inception: Inception, folder: Path) -> Tensor:
    files = sorted(folder.iterdir())
    parts = [files[k : k + BATCH] for k in range(0, len(files), BATCH)]
    return torch.cat([inception([*map(open_picture, part)]) for part in track(parts, folder.name)])


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*install, str(root / "packages"), *PACKAGES], check=True)
        torch.jit.save(torch.jit.script(StandIn().eval()), root / INCEPTION)
        folders = root / "a", root / "b"
        draw(folders[0], 0, 255)
        draw(folders[1], 1, 230)
        inception = Inception(root / INCEPTION, "cpu")
        ours = frechet_distance(*(features(inception, folder) for folder in folders))
        given = map(str, (root / "packages", root / INCEPTION, *folders))
        command = [sys.executable, "-c", THEIRS, *given]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    theirs = float(said.splitlines()[-1])
    result = {
        "pictures": PICTURES,
        "features": FEATURES,
        "rapm": ours,
        "clean-fid": theirs,
        "difference": abs(ours - theirs),
        "packages": PACKAGES,
        "versions": versions(),
    }
    write_json(Path(__file__).parent / "results" / "cleanfid.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

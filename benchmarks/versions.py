"""Which versions of diffusers and peft load the exported LoRA files, as the trained student.

    python benchmarks/versions.py                 # all; each is installed beside: minutes
    python benchmarks/versions.py --only 0.30.3

A small run of random weights is made on the spot, of Stable Diffusion and of SDXL. Each version is
installed into a temporary folder without its dependencies, over the torch that is here. It loads
both files into a fresh network, and its prediction is held against the trained student's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import make_pipeline
from rapm import pipeline, settings
from rapm.export import exported
from rapm.io import save_tensors
from rapm.network import STUDENT
from rapm.sample import open_sampler

VERSIONS = (  # diffusers, peft, transformers, tokenizers, huggingface_hub of one time
    ("0.30.3", "0.12.0", "4.44.2", "0.19.1", "0.24.7"),
    ("0.32.2", "0.14.0", "4.48.3", "0.21.0", "0.27.1"),
    ("0.34.0", "0.15.2", "4.52.4", "0.21.1", "0.33.2"),
    ("0.35.2", "0.17.1", "4.56.2", "0.22.1", "0.35.3"),
    ("0.36.0", "0.18.0", "4.57.3", "0.22.1", "0.36.0"),
)
LOAD = """
import sys, json, torch
sys.path.insert(0, sys.argv[1])
import diffusers, peft
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
job = json.loads(sys.argv[2])
kind = getattr(diffusers, job["pipeline"])
given = load_file(job["inputs"])
wanted = given.pop("wanted")
for file in [None, *job["files"]]:
    network = UNet2DConditionModel.from_pretrained(job["unet"])
    if file:
        state, alphas, *_ = kind.lora_state_dict(file, unet_config=network.config)
        kind.load_lora_into_unet(state, alphas, network)
    added = {k: given[k] for k in ("text_embeds", "time_ids") if k in given}
    with torch.no_grad():
        out = network(given["z"], given["t"], given["prompt_embeds"], added_cond_kwargs=added)[0]
    print(f"{float((out - wanted).abs().max()):.2g}", end=" ")
assert diffusers.__file__.startswith(sys.argv[1]) and peft.__file__.startswith(sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="one version of diffusers")
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        jobs = {kind: make_job(kind, root / kind) for kind in ("sd15", "sdxl")}
        for names in VERSIONS:
            if only in ("", names[0]):
                load(names, root / names[0], jobs)


def make_job(kind: str, folder: Path) -> dict[str, object]:
    """A run of a small teacher, and what its student predicts."""
    make_pipeline(kind).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red star\na blue ring\n")
    config = settings.load(
        teacher=str(folder / "teacher"),
        prompts=folder / "prompts.txt",
        settings=[
            *("trajectories.count=2", "trajectories.fine_steps=1", "student.learning_rate=0.01"),
            *("training.iterations=8", "training.warmup=0", "samples.count=0"),
        ],
    )
    run = pipeline.open_run(config, folder / "run")
    pipeline.distill_run(run)
    sampler = open_sampler(run)
    conditioning, _ = sampler.encode(["a red star"])
    z, t = torch.randn(1, *sampler.shape), torch.tensor([499])
    with torch.no_grad(), sampler.backbone.adapter(STUDENT):
        wanted = sampler.backbone(z, t, conditioning)
    names = {"pooled_prompt_embeds": "text_embeds"}
    inputs = {names.get(name, name): value for name, value in conditioning.items()}
    save_tensors(folder / "in.safetensors", inputs | {"z": z, "t": t, "wanted": wanted})
    files = exported(run)
    return {
        "pipeline": sampler.teacher.family.pipeline.__name__,
        "unet": str(folder / "teacher" / "unet"),
        "inputs": str(folder / "in.safetensors"),
        "files": [str(files.diffusers), str(files.kohya)],
    }


def load(names: tuple[str, ...], target: Path, jobs: dict[str, dict[str, object]]) -> None:
    """Prints how far a prediction is from the student's: without a LoRA, with either file's."""
    packages = ("diffusers", "peft", "transformers", "tokenizers", "huggingface_hub")
    wanted = [f"{package}=={version}" for package, version in zip(packages, names, strict=True)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([word for word in (*pip, "httpx") if word != "--no-deps"], check=True)
    for kind, job in jobs.items():
        command = [sys.executable, "-W", "ignore", "-c", LOAD, str(target), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stdout or done.stderr).strip().splitlines()
        far = lines[-1] if lines else "failed"
        print(f"diffusers {names[0]}, peft {names[1]}, {kind}: {far}", flush=True)


if __name__ == "__main__":
    main()

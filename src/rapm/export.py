"""What other programs load: the student as LoRA files, with a model card that is read off the run.

One file is for diffusers, one for ComfyUI, A1111 and Forge.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from rapm import settings
from rapm.io import files_together, save_tensors, with_prefix, write_text
from rapm.models.teacher import Teacher
from rapm.network import STUDENT
from rapm.prompts import is_hub
from rapm.run import Run
from rapm.sample import open_sampler
from rapm.schedule import trailing_timesteps
from rapm.scores import scores_of
from rapm.text import code_block, code_cell, code_span

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

METHOD_WORDS = {
    "rapm": "The method is RAPM, relative and absolute position matching\n"
    "([arXiv 2503.20744](https://arxiv.org/abs/2503.20744)).",
    "midpoint": "The method is `midpoint`, rapm's own: the student's step is an implicit midpoint "
    "step of the\nteacher. It is not RAPM; the idea of learning from the teacher's positions is "
    "RAPM's\n([arXiv 2503.20744](https://arxiv.org/abs/2503.20744)).",
}

CARD = """---
{base}base_model_relation: adapter
tags: [text-to-image, diffusers, lora, template:sd-lora, {method}]
---
# A {steps}-step LoRA, trained by rapm's method `{method}`

Distilled with rapm {version} from {teacher} at guidance scale {guidance_scale}, {baked}. {words}
{loras}
{use}
{scores}
## Settings

{settings}
"""
OF_BETAS = """| file | for |
|---|---|
| `{diffusers_file}` | diffusers 0.30 and newer; other programs load a part of it and say nothing |
| {kohya_cell} | ComfyUI, Forge, A1111, SD.Next, InvokeAI and kohya's scripts |

Both hold the same LoRA. Its strength is 1.0.

## diffusers

```python
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("TEACHER")
pipe.load_lora_weights("FOLDER", weight_name="{diffusers_file}")
pipe.scheduler = DDIMScheduler.from_pretrained("FOLDER", subfolder="scheduler")
image = pipe("a prompt", num_inference_steps={steps}, guidance_scale=1.0).images[0]
```

TEACHER is the model it was distilled from, FOLDER is where this file is.

## Other programs

{kohya_file} goes where your LoRAs are. {steps} steps and cfg 1 everywhere.

| program | sampler | scheduler |
|---|---|---|
| ComfyUI | euler | simple; sgm_uniform is as good |
| Forge, A1111 | Euler | Simple or SGM Uniform; not Automatic |

Do not take DDIM in A1111 and Forge: it ignores the scheduler, and asks for timesteps that this LoRA
was not trained on.
"""
OF_FLOW = """`{diffusers_file}` is for diffusers and ComfyUI. Its strength is 1.0.

## diffusers

```python
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

pipe = DiffusionPipeline.from_pretrained("TEACHER")
pipe.load_lora_weights("FOLDER", weight_name="{diffusers_file}")
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("FOLDER", subfolder="scheduler")
image = pipe(prompt="a prompt", sigmas={sigmas}, guidance_scale={guidance}).images[0]
```

TEACHER is the model it was distilled from, FOLDER is where this file is. Give `sigmas` as they are
here: those that a pipeline takes by itself may be others.

## ComfyUI

The file goes where your LoRAs are, under any name. {steps} steps, cfg 1, sampler euler, scheduler
simple.{told} The shift is {shift:.4g}, its logarithm {mu:.4g}: a ModelSampling node sets it where
the model's own is another.
"""
SCORES_END = "<!-- rapm: end of scores -->\n"


@dataclass(frozen=True)
class Exported:
    """Where the files of a run's ``export/`` are.

    ``kohya`` is for other programs; there is none where these read diffusers' own.
    """

    diffusers: Path
    kohya: Path


def exported(run: Run) -> Exported:
    """Where they are, or will be."""
    name = f"{run.folder.resolve().name}-{run.config.trajectories.slots}-steps.safetensors"
    return Exported(run.export / DIFFUSERS_FILE, run.export / name)


def export_run(run: Run) -> Exported:
    """Writes ``export/``: the student's LoRA in both forms, the scheduler's config, a model card.

    Training is at scale 1 (alpha = rank) and both files say so, so they load at strength 1.0.
    """
    with run.locked():
        sampler, config = open_sampler(run), run.config
        teacher, backbone, steps = sampler.teacher, sampler.backbone, config.trajectories.slots
        files, part = exported(run), teacher.family.network
        state, names = backbone.lora_state(STUDENT), teacher.family.lora_names(backbone.network)
        with files_together(run.export) as folder:
            # Without peft's settings as metadata, which other versions of it refuse. diffusers
            # takes alpha for the rank then, and so it is.
            save_tensors(folder / DIFFUSERS_FILE, with_prefix(part, state), {"format": "pt"})
            size = config.trajectories.sizes()[0] or teacher.size()
            if names:
                described = kohya_metadata(
                    teacher, config.student.rank, files.kohya.stem, steps, size
                )
                save_tensors(folder / files.kohya.name, kohya_state(state, names[0]), described)
            teacher.scheduler().save_pretrained(folder / "scheduler")
            write_text(folder / "README.md", model_card(run, teacher, files.kohya.name))
        return files


def model_card(run: Run, teacher: Teacher, kohya_file: str) -> str:
    """Of what the run was: its method, teacher and settings. Where things lay is left out."""
    config = run.config
    fused = "".join(
        f"- {code_span(lo.file.name)} at strength {lo.strength:g}\n" for lo in teacher.loras
    )
    local = os.path.isabs(config.teacher)  # where it lies is nobody else's business
    places = {
        "teacher": os.path.basename(config.teacher) if local else config.teacher,
        "teacher_config": os.path.basename(config.teacher_config),
        "teacher_loras": [os.path.basename(name) for name in config.teacher_loras],
    }
    prompts, scale = config.trajectories.prompts, config.trajectories.guidance_scale
    prompts = prompts if is_hub(prompts) else os.path.basename(prompts)
    shown = config.trajectories.model_copy(update={"prompts": prompts})
    loras = f"\nThese LoRAs are fused into its teacher; load them too, so:\n\n{fused}"
    return CARD.format(
        base="" if local else f"base_model: {config.teacher.partition('@')[0]}\n",
        method=config.method,
        words=METHOD_WORDS[config.method],
        teacher=code_span(places["teacher"]),
        loras=loras if fused else "",
        steps=config.trajectories.slots,
        guidance_scale=scale,
        baked="which the\nnetwork is told: sample at the same"
        if teacher.family.guidance_is_input
        else "which is baked\nin: sample without guidance",
        version=version("rapm"),
        use=_how_to_use(teacher, config.trajectories.slots, scale, kohya_file),
        scores=_scores_start(run) + scores_text(run) + SCORES_END,
        settings=code_block(
            settings.dump(config.model_copy(update={**places, "trajectories": shown})), "toml"
        ),
    )


def _how_to_use(teacher: Teacher, steps: int, guidance_scale: float, kohya_file: str) -> str:
    family, scale = teacher.family, teacher.student_guidance(guidance_scale)
    return (OF_FLOW if family.flow else OF_BETAS).format(
        steps=steps,
        diffusers_file=DIFFUSERS_FILE,
        kohya_file=code_span(kohya_file),
        kohya_cell=code_cell(kohya_file),
        sigmas=[(t + 1) / 1000 for t in trailing_timesteps(steps)[:-1]],
        guidance=family.pipeline_guidance(scale),
        told=f" A FluxGuidance node says {scale:g}." if family.guidance_is_input else "",
        shift=teacher.schedule.shift,
        mu=math.log(teacher.schedule.shift),
    )


def scores_text(run: Run) -> str:
    """The scores of the newest checkpoint, as a card shows them; empty where there are none."""
    parts = []
    for scores in scores_of(run):
        titles, rows = scores.cells()
        lines = [titles, ["---"] * len(titles), *rows]
        parts += [*(f"| {' | '.join(line)} |" for line in lines), ""]
        parts += [code_span(scores.described()), "", *(f"{note}\n" for note in scores.notes)]
    return "\n".join(["## Scores", "", *parts, ""]) if parts else ""


def _scores_start(run: Run) -> str:
    return f"<!-- rapm: scores of checkpoint {run.newest_checkpoint()[1][:16]} -->\n"


def tell_scores(run: Run) -> None:
    """Brings the scores into a card that is there, if it is of the same checkpoint; what else was
    written into it stays."""
    card = run.export / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, start, rest = text.partition(_scores_start(run))
    _, end, after = rest.partition(SCORES_END)
    told = before + start + scores_text(run) + end + after
    if end and told != text:
        write_text(card, told)


def kohya_state(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """A LoRA in kohya's form: of each layer the two halves, and alpha, which is the rank.

    Args:
        state: in peft's names, of scale 1.
        names: what kohya's files call each layer, see :attr:`rapm.models.Family.lora_names`.
    """
    halves, written = {"lora_A": "lora_down", "lora_B": "lora_up"}, {}
    for name, value in state.items():
        path, half, _ = name.rsplit(".", 2)
        layer = f"lora_unet_{names[path].replace('.', '_')}"
        written[f"{layer}.{halves[half]}.weight"] = value
        if half == "lora_A":
            written[f"{layer}.alpha"] = torch.tensor(float(len(value)))
    return written


def kohya_metadata(
    teacher: Teacher, rank: int, title: str, steps: int, size: tuple[int, int]
) -> dict[str, str]:
    """What kohya's tools, ComfyUI's and A1111's browsers show of a LoRA, and choose a base by."""
    base, architecture = teacher.family.base_model(teacher.config)
    width, height = size
    return {
        "ss_base_model_version": base,
        "ss_v2": str(base.startswith("sd_v2")),  # by which alone A1111 tells Stable Diffusion 2
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.usage_hint": f"{steps} steps, cfg 1, sampler euler, scheduler simple, strength "
        "1.0; in A1111 and Forge never DDIM",
    }

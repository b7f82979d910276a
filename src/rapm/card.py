"""The model card beside a run's LoRA files, read off the run: method, teacher, settings, scores."""

from __future__ import annotations

import math
import os
from importlib.metadata import version

from rapm import settings
from rapm.io import write_text
from rapm.models.teacher import Teacher
from rapm.prompts import is_hub
from rapm.run import Run
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


def model_card(run: Run, teacher: Teacher, kohya_file: str, step: int | None = None) -> str:
    """Of what the run was: its method, teacher and settings. Where things lay is left out.

    Args:
        step: of the checkpoint that the files are of; the newest when left out. Scores are the
            newest one's, and stand in its card alone.
    """
    config, (newest, digest) = run.config, run.newest_checkpoint()
    is_newest = step in (None, newest)
    digest = digest if is_newest or step is None else run.checkpoint_digest(step)
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
        scores=_scores_start(digest) + (scores_text(run) if is_newest else "") + SCORES_END,
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


def _scores_start(digest: str) -> str:
    return f"<!-- rapm: scores of checkpoint {digest[:16]} -->\n"


def tell_scores(run: Run) -> None:
    """Brings the scores into a card that is there, if it is of the same checkpoint; what else was
    written into it stays."""
    card = run.export / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, start, rest = text.partition(_scores_start(run.newest_checkpoint()[1]))
    _, end, after = rest.partition(SCORES_END)
    told = before + start + scores_text(run) + end + after
    if end and told != text:
        write_text(card, told)

"""What other programs load: the student as a LoRA for diffusers and one for ComfyUI, A1111 and
Forge, with a model card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from rapm.io import complete_or_absent_folder, share
from rapm.models.teacher import Teacher
from rapm.network import STUDENT
from rapm.run import Run
from rapm.sample import open_studio

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

CARD = """---
{base}base_model_relation: adapter
tags: [text-to-image, diffusers, lora, template:sd-lora, rapm]
---
# A {steps}-step LoRA by RAPM

Distilled with rapm {version} (relative and absolute position matching, arXiv 2503.20744) from `{teacher}` at guidance scale
{guidance_scale}, which is baked in: sample without guidance.
{loras}
## diffusers

```python
from diffusers import DDIMScheduler

pipe.load_lora_weights("FOLDER")          # strength 1.0
pipe.scheduler = DDIMScheduler.from_pretrained("FOLDER", subfolder="scheduler")
pipe("a prompt", num_inference_steps={steps}, guidance_scale=1.0)
```

## ComfyUI, Forge, A1111

`{kohya_file}` goes where your LoRAs are. {usage}.
"""


@dataclass(frozen=True)
class Exported:
    """Where the files of a run's ``export/`` are."""

    diffusers: Path
    kohya: Path


def exported(run: Run) -> Exported:
    name = f"{run.folder.resolve().name}-{run.config.trajectories.slots}-steps.safetensors"
    return Exported(run.export / DIFFUSERS_FILE, run.export / name)


def export_run(run: Run) -> Exported:
    """Writes ``export/``: the student's averaged LoRA in both forms, the scheduler's config, a
    model card.

    Training is at scale 1 (alpha = rank) and both files say so, so they load at strength 1.0.
    """
    studio, config = open_studio(run), run.config
    teacher, backbone, steps = studio.teacher, studio.backbone, config.trajectories.slots
    files = exported(run)
    with complete_or_absent_folder(run.export) as folder:
        part = teacher.family.network
        lora = backbone.configs[STUDENT].to_dict()
        lora["target_modules"] = sorted(lora["target_modules"])  # a set: in another order each time
        metadata = {f"{part}_lora_adapter_metadata": lora}
        state = backbone.lora_state(STUDENT)
        teacher.family.pipeline.save_lora_weights(
            folder, **{f"{part}_lora_layers": state}, **metadata
        )
        share(folder / DIFFUSERS_FILE)
        usage = f"{steps} steps, cfg 1, sampler euler or ddim, scheduler sgm_uniform, strength 1.0"
        described = kohya_metadata(teacher, config.student.rank, files.kohya.stem, usage)
        save_file(kohya_state(state, part), folder / files.kohya.name, described)
        share(folder / files.kohya.name)
        teacher.ddim_scheduler().save_pretrained(folder / "scheduler")
        fused = "".join(
            f"- `{lora.file.name}` at strength {lora.strength:g}\n" for lora in teacher.loras
        )
        local = os.path.isabs(config.teacher)  # where it lies is nobody else's business
        card = CARD.format(
            base="" if local else f"base_model: {config.teacher.partition('@')[0]}\n",
            teacher=os.path.basename(config.teacher) if local else config.teacher,
            loras=f"\nIts teacher has these LoRAs fused in; load them too, at that "
            f"strength:\n\n{fused}"
            if fused
            else "",
            steps=steps,
            guidance_scale=config.trajectories.guidance_scale,
            version=version("rapm"),
            kohya_file=files.kohya.name,
            usage=usage,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return files


def kohya_state(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """A LoRA in kohya's names, ``lora_unet_<module path with _>``: ``.lora_down.weight``,
    ``.lora_up.weight`` and ``.alpha``.

    Args:
        state: in peft's names, of scale 1.
        part: the pipeline's part that it belongs to.
    """
    named = convert_state_dict_to_kohya(
        {f"{part}.{name}": value for name, value in state.items()}
    )  # alpha = rank, always
    return {
        name: value.float() if name.endswith(".alpha") else value.contiguous()
        for name, value in named.items()
    }


def kohya_metadata(teacher: Teacher, rank: int, title: str, usage: str) -> dict[str, str]:
    """What kohya's tools, ComfyUI's and A1111's file browsers show of a LoRA, and choose a base
    model by."""
    base, architecture = teacher.family.base_model(teacher.config)
    width, height = teacher.size()
    return {
        "ss_base_model_version": base,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": title,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.usage_hint": usage,
    }

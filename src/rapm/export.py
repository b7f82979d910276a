"""What other programs load: the student as LoRA files, with a model card that is read off the run.

One file is for diffusers, one for ComfyUI, A1111 and Forge.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from rapm import settings
from rapm.io import complete_or_absent_folder, share
from rapm.models.teacher import Teacher
from rapm.network import STUDENT
from rapm.prompts import is_hub
from rapm.run import Run
from rapm.sample import open_sampler

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

Distilled with rapm {version} from `{teacher}` at guidance scale {guidance_scale}, which is baked
in: sample without guidance. {words}
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

## Settings

```toml
{settings}```
"""


@dataclass(frozen=True)
class Exported:
    """Where the files of a run's ``export/`` are."""

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
    sampler, config = open_sampler(run), run.config
    teacher, backbone, steps = sampler.teacher, sampler.backbone, config.trajectories.slots
    files, part = exported(run), teacher.family.network
    usage = f"{steps} steps, cfg 1, sampler euler or ddim, scheduler sgm_uniform, strength 1.0"
    with complete_or_absent_folder(run.export) as folder:
        lora = backbone.configs[STUDENT].to_dict()
        lora["target_modules"] = sorted(lora["target_modules"])  # a set: in another order each time
        state = backbone.lora_state(STUDENT)
        given = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": lora}
        teacher.family.pipeline.save_lora_weights(folder, **given)
        described = kohya_metadata(teacher, config.student.rank, files.kohya.stem, usage)
        save_file(kohya_state(state, part), folder / files.kohya.name, described)
        for file in (DIFFUSERS_FILE, files.kohya.name):
            share(folder / file)
        teacher.ddim_scheduler().save_pretrained(folder / "scheduler")
        card = model_card(run, teacher, files.kohya.name, usage)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return files


def model_card(run: Run, teacher: Teacher, kohya_file: str, usage: str) -> str:
    """Of what the run was: its method, teacher and settings. Where things lay is left out."""
    config = run.config
    fused = "".join(f"- `{lo.file.name}` at strength {lo.strength:g}\n" for lo in teacher.loras)
    local = os.path.isabs(config.teacher)  # where it lies is nobody else's business
    places = {
        "teacher": os.path.basename(config.teacher) if local else config.teacher,
        "teacher_config": os.path.basename(config.teacher_config),
        "teacher_loras": [os.path.basename(name) for name in config.teacher_loras],
    }
    prompts = config.trajectories.prompts
    prompts = prompts if is_hub(prompts) else os.path.basename(prompts)
    shown = config.trajectories.model_copy(update={"prompts": prompts})
    loras = f"\nThese LoRAs are fused into its teacher; load them too, so:\n\n{fused}"
    return CARD.format(
        base="" if local else f"base_model: {config.teacher.partition('@')[0]}\n",
        method=config.method,
        words=METHOD_WORDS[config.method],
        teacher=places["teacher"],
        loras=loras if fused else "",
        steps=config.trajectories.slots,
        guidance_scale=config.trajectories.guidance_scale,
        version=version("rapm"),
        kohya_file=kohya_file,
        usage=usage,
        settings=settings.dump(config.model_copy(update={**places, "trajectories": shown})),
    )


def kohya_state(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """A LoRA in kohya's names: ``lora_unet_<module path with _>`` and one of three endings.

    They are ``.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

    Args:
        state: in peft's names, of scale 1.
        part: the pipeline's part that it belongs to.
    """
    # alpha = rank, always
    named = convert_state_dict_to_kohya({f"{part}.{name}": v for name, v in state.items()})
    return {n: v.float() if n.endswith(".alpha") else v.contiguous() for n, v in named.items()}


def kohya_metadata(teacher: Teacher, rank: int, title: str, usage: str) -> dict[str, str]:
    """What kohya's tools, ComfyUI's and A1111's browsers show of a LoRA, and choose a base by."""
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

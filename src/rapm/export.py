"""What other programs load: the student as LoRA files, with a model card that is read off the run.

One file is for diffusers, one for ComfyUI, A1111 and Forge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rapm.card import DIFFUSERS_FILE, model_card
from rapm.config import Config
from rapm.io import files_together, save_tensors, with_prefix, write_json, write_text
from rapm.models.teacher import Teacher
from rapm.network import STUDENT
from rapm.readback import Readback
from rapm.run import Run
from rapm.sample import open_sampler
from rapm.workflow import WORKFLOW, workflow


@dataclass(frozen=True)
class Exported:
    """Where the files of a run's ``export/`` are.

    ``kohya`` is for other programs; there is none where these read diffusers' own.
    """

    diffusers: Path
    kohya: Path


def exported(run: Run, folder: Path | None = None) -> Exported:
    """Where they are, or will be; in the run's ``export/`` when no folder is named."""
    folder = folder or run.export
    name = f"{run.folder.resolve().name}-{run.config.trajectories.slots}-steps.safetensors"
    return Exported(folder / DIFFUSERS_FILE, folder / name)


def export_run(
    run: Run,
    folder: Path | None = None,
    *,
    step: int | None = None,
    dtype: str = "float32",
    fused: bool = False,
) -> Exported:
    """Writes the student's LoRA in both forms, the scheduler's config and a model card.

    Training is at scale 1 (alpha = rank) and both files say so, so they load at strength 1.0. Each
    is read back by diffusers into a fresh network, and held to the student, before it takes its
    place.

    Args:
        folder: where to; the run's ``export/`` when left out.
        step: of the student's checkpoint; the newest when left out.
        dtype: of the files: float32, bfloat16 or float16.
        fused: writes ``fused/`` too, a whole pipeline with the LoRA in its weights.

    Raises:
        UserError: the run has no such checkpoint, or a file reads back as something else.
    """
    with run.locked():
        sampler, config = open_sampler(run, step=step), run.config
        teacher, backbone, steps = sampler.teacher, sampler.backbone, config.trajectories.slots
        files, part = exported(run, folder), teacher.family.network
        state, names = backbone.lora_state(STUDENT), teacher.family.lora_names(backbone.network)
        state = {name: x.to(getattr(torch, dtype)) for name, x in state.items()}
        readback = Readback(teacher, config, backbone)
        del sampler, backbone  # the network read back takes its place
        with files_together(files.diffusers.parent) as made:
            # Without peft's settings as metadata, which other versions of it refuse. diffusers
            # takes alpha for the rank then, and so it is.
            save_tensors(made / DIFFUSERS_FILE, with_prefix(part, state), {"format": "pt"})
            size = config.trajectories.sizes()[0] or teacher.size()
            if names:
                described = kohya_metadata(
                    teacher, config.student.rank, files.kohya.stem, steps, size
                )
                save_tensors(made / files.kohya.name, kohya_state(state, names[0]), described)
                checkpoint = (
                    teacher.checkpoint.name if teacher.checkpoint else "TEACHER.safetensors"
                )
                nodes = workflow(checkpoint, files.kohya.name, steps, size)
                write_json(made / WORKFLOW, nodes)
            for file in sorted(made.glob("*.safetensors")):
                readback.check(file, rounded=dtype != "float32")
            if fused:
                _save_fused(teacher, config, made / DIFFUSERS_FILE, made / "fused")
                readback.check_folder(made / "fused")
            teacher.scheduler().save_pretrained(made / "scheduler")
            write_text(made / "README.md", model_card(run, teacher, files.kohya.name, step))
        return files


def _save_fused(teacher: Teacher, config: Config, lora: Path, folder: Path) -> None:
    """A whole pipeline, of the teacher's weights with a LoRA in them."""
    parts = [teacher.family.network, "vae", *teacher.family.text_parts]
    pipeline = teacher.load(parts, config.torch_dtype, "cpu")
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.scheduler = teacher.scheduler()
    pipeline.save_pretrained(folder)


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

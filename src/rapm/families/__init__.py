"""Model families: what a kind of diffusers pipeline needs told, and finding the right one for a teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from rapm.errors import UserError
from rapm.objective import Conditioning
from rapm.schedule import PredictionType, Schedule
from rapm.toy import TEACHER


@dataclass(frozen=True)
class Family:
    """What the library must know of a kind of pipeline.

    Attributes:
        pipeline: the diffusers pipeline class.
        network: name of the denoising network among the pipeline's components.
        lora_targets: names of the modules that get LoRA: all attention, feed-forward and convolution layers.
        taps: module paths of the critics' features for a network.
        call: runs the network: ``(network, z, t, conditioning) -> prediction``.
        encode: ``(pipeline, prompts) -> conditioning``, tensors [n, ...] on the CPU.
        decode: ``(pipeline, z [n, C, h, w]) -> images``, float32 [n, 3, H, W] in [-1, 1], on the CPU.
        latent_shape: ``(pipeline, height, width) -> (C, h, w)``; None takes the teacher's own size.
        save_lora: ``(folder, peft state, adapter metadata)`` writes the file diffusers loads.
    """

    pipeline: type[Any]
    network: str
    lora_targets: tuple[str, ...]
    taps: Callable[[nn.Module], list[str]]
    call: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    encode: Callable[[Any, Sequence[str]], dict[str, Tensor]]
    decode: Callable[[Any, Tensor], Tensor]
    latent_shape: Callable[[Any, int | None, int | None], tuple[int, int, int]]
    save_lora: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]


def _families() -> dict[str, Family]:
    from rapm.families import stable_diffusion

    return {"StableDiffusionPipeline": stable_diffusion.FAMILY}


@dataclass(frozen=True)
class Teacher:
    """A teacher that was found; nothing of it is loaded yet.

    Attributes:
        source: as the user gave it.
        folder: where its pipeline lies.
        fingerprint: changes when the teacher does: of names, sizes and 64 KiB out of every 4 MiB of every file.
    """

    source: str
    folder: Path
    family: Family
    schedule: Schedule
    fingerprint: str

    def load_pipeline(self, precision: torch.dtype, device: str) -> Any:
        """The whole pipeline, for encoding prompts and for pictures; its safety checker is left out.

        Raises:
            UserError: a part of it is missing or damaged.
        """
        _no_bars()
        try:
            pipeline = self.family.pipeline.from_pretrained(
                self.folder, dtype=precision, safety_checker=None, use_safetensors=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"teacher '{self.source}' cannot be loaded: {_first_line(error)}") from None
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def load_network(self, precision: torch.dtype, device: str) -> Any:
        """The denoising network alone, which is all that training needs.

        Raises:
            UserError: it is missing or damaged.
        """
        _no_bars()
        try:
            index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
            network_class = getattr(diffusers, index[self.family.network][1])
            network = network_class.from_pretrained(
                self.folder, subfolder=self.family.network, dtype=precision, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise UserError(f"teacher '{self.source}' cannot be loaded: {_first_line(error)}") from None
        return network.to(device)

    def load_tokenizers(self) -> list[Any]:
        """All that a prompt goes through, each with its own limit.

        Raises:
            UserError: one is missing or damaged.
        """
        try:
            index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
            parts = [part for part in index if part.startswith("tokenizer")]
            return [getattr(transformers, index[part][1]).from_pretrained(self.folder, subfolder=part) for part in parts]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"teacher '{self.source}' cannot be loaded: {_first_line(error)}") from None


def ddim_scheduler(config: Any) -> Any:
    """The DDIM scheduler of a teacher, whatever scheduler its config is of: its betas, trailing timesteps, nothing clipped.

    What a config of another scheduler leaves out is what Stable Diffusion has, and not what DDIMScheduler's defaults are.
    """
    final = {} if "set_alpha_to_one" in config else {"set_alpha_to_one": False}
    own = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(config, **own, **final)


def find_teacher(source: str) -> Teacher:
    """Finds a teacher: ``toy``, or a folder in diffusers' layout.

    Raises:
        UserError: there is no such folder, or it holds no pipeline of a known family.
    """
    folder = TEACHER if source == "toy" else Path(source)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise UserError(f"teacher '{source}' is neither 'toy' nor a diffusers folder (no model_index.json in it)")
    try:
        name = json.loads(index_file.read_text(encoding="utf-8"))["_class_name"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(f"teacher '{source}': its model_index.json is damaged") from None
    families = _families()
    if name not in families:
        raise UserError(f"teacher '{source}' is a {name}; this version distils {', '.join(families)}")
    try:
        scheduler = ddim_scheduler(diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler"))
    except (OSError, ValueError):
        raise UserError(f"teacher '{source}' has no readable scheduler/scheduler_config.json") from None
    kind, timesteps = scheduler.config["prediction_type"], len(scheduler.alphas_cumprod)
    if kind not in get_args(PredictionType) or timesteps != 1000:
        raise UserError(
            f"teacher '{source}' predicts '{kind}' over {timesteps} timesteps; "
            f"this version distils {', '.join(get_args(PredictionType))} over 1000"
        )
    schedule = Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, kind)
    return Teacher(source, folder, families[name], schedule, _fingerprint(folder))


def _no_bars() -> None:
    """The libraries' own bars for loading would run into ours."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _fingerprint(folder: Path) -> str:
    """Of the parts a trajectory depends on. Large files are read in samples: a teacher may weigh gigabytes."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        part = file.relative_to(folder).parts[0]
        if file.is_file() and part.startswith(("unet", "transformer", "text_encoder", "tokenizer", "scheduler")):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size} ".encode())
            with file.open("rb") as stream:
                for offset in range(0, size, 1 << 22):
                    stream.seek(offset)
                    digest.update(stream.read(1 << 16))
    return digest.hexdigest()

"""A teacher that `resolve.py` found, loaded part by part when a part is needed."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

from rapm.config import Config
from rapm.errors import UserError, first_line
from rapm.models import Family
from rapm.models.lora import Lora, fuse
from rapm.network import Backbone
from rapm.quantize import quantize
from rapm.schedule import Schedule
from rapm.toy import TEACHER as TOY

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    HfHubHTTPError,
)


@dataclass(frozen=True)
class Teacher:
    """A teacher that was found; nothing of it is loaded yet.

    Attributes:
        source: as the user gave it.
        folder: in diffusers' layout; what it holds beside configs and tokenizers depends on the
            next two.
        checkpoint: the single file that holds the weights, else they lie in the folder.
        random: there are no weights, they are drawn (always the same).
        loras: fused in this order.
        captions: ``(count, seed, split) -> captions`` of its own, if it brings some.
        fingerprint: changes when the teacher does: of names, sizes and 64 KiB out of every 4 MiB of
            what is loaded.
    """

    source: str
    folder: Path
    checkpoint: Path | None
    random: bool
    loras: tuple[Lora, ...]
    family: Family
    schedule: Schedule
    fingerprint: str
    captions: Callable[[int, int, Any], list[str]] | None = None

    def config(self, part: str) -> Mapping[str, Any]:
        """A part's config.

        Raises:
            UserError: it is missing or damaged.
        """
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        try:
            return json.loads((self.folder / part / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"teacher '{self.source}' has no readable {part}/{name}") from None

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, h, w) of a picture of (width, height) pixels; None is the teacher's own size.

        Raises:
            UserError: this teacher cannot have that size.
        """
        try:
            return self.family.latent_shape(self.config, size)
        except ValueError as error:
            raise UserError(f"trajectories.size: {error}") from None

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of this teacher's own pictures."""
        _, height, width = self.latent_shape(None)
        factor = 2 ** (len(self.config("vae")["block_out_channels"]) - 1)
        return width * factor, height * factor

    def load(self, parts: Sequence[str], precision: torch.dtype, device: str) -> Any:
        """A pipeline of these parts and no others: text parts to encode prompts, the VAE to see
        pictures.

        Raises:
            UserError: a part is missing or damaged, or a LoRA does not fit.
        """
        # the libraries' own bars for loading would run into ours
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        names, options = self.family.pipeline._get_signature_keys(self.family.pipeline)
        absent: dict[str, Any] = {name: None for name in names if name not in {*parts, "scheduler"}}
        if "requires_safety_checker" in options:
            absent["requires_safety_checker"] = False
        try:
            if self.random:
                built = {part: self.draw(part, precision, device) for part in parts}
                pipeline = self.family.pipeline(**absent, **built, scheduler=self.ddim_scheduler())
            elif self.checkpoint:
                pipeline = self.family.pipeline.from_single_file(
                    str(self.checkpoint),
                    config=str(self.folder),
                    local_files_only=True,
                    torch_dtype=precision,
                    **absent,
                )
            else:
                pipeline = self.family.pipeline.from_pretrained(
                    self.folder,
                    dtype=precision,
                    use_safetensors=True,
                    variant=self._variant(parts),
                    **absent,
                )
            move(pipeline, device)
        except torch.OutOfMemoryError:  # for who knows what would lower it
            raise
        except _UNREADABLE as error:
            raise UserError(
                f"teacher '{self.source}' cannot be loaded: {first_line(error)}"
            ) from None
        pipeline.set_progress_bar_config(disable=True)
        fusible = [part for part in parts if part.startswith((self.family.network, "text_encoder"))]
        for lora in self.loras:
            fuse(lora, {p: getattr(pipeline, p) for p in fusible}, self.family, self.source)
        return pipeline

    def _variant(self, parts: Sequence[str]) -> str | None:
        """fp16 when that is all that a part's folder has weights of."""
        weights = [file.name for part in parts for file in weights_of(self.folder / part)]
        return "fp16" if any(".fp16." in name for name in weights) else None

    def load_tokenizers(self) -> list[Any]:
        """All that a prompt goes through, each with its own limit. Raises as :meth:`load` does."""
        parts = [part for part in self.family.text_parts if part.startswith("tokenizer")]
        pipeline = self.load(parts, torch.float32, "cpu")
        return [getattr(pipeline, part) for part in parts]

    def load_network(self, precision: torch.dtype, device: str) -> Any:
        """The denoising network, which is all that rollout and training need. Raises as
        :meth:`load` does.

        A stage leaves its network in cycles of hooks and adapted layers. Uncollected, the rollout's
        would stay on a GPU beside the one that is trained, and both beside the one for pictures.
        """
        gc.collect()
        return getattr(self.load([self.family.network], precision, device), self.family.network)

    def ddim_scheduler(self) -> Any:
        return ddim_scheduler(self.config("scheduler"))

    def draw(self, part: str, precision: torch.dtype, device: str) -> Any:
        """A part with random weights (on the meta device without any); the tokenizer is the toy
        teacher's."""
        if part.startswith("tokenizer"):
            return transformers.CLIPTokenizer.from_pretrained(TOY / "tokenizer")
        library, name = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))[
            part
        ]
        kind, config = (
            getattr(diffusers if library == "diffusers" else transformers, name),
            self.config(part),
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(precision)
        try:
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                model = (
                    kind.from_config(config)
                    if library == "diffusers"
                    else kind(kind.config_class(**config))
                )
        finally:
            torch.set_default_dtype(before)
        return model.eval()


def ddim_scheduler(config: Any) -> Any:
    """The DDIM scheduler of a teacher, whatever scheduler its config is of: its betas, trailing
    timesteps, nothing clipped.

    What a config of another scheduler leaves out is what Stable Diffusion has, and not what
    DDIMScheduler's defaults are.
    """
    final = {} if "set_alpha_to_one" in config else {"set_alpha_to_one": False}
    own = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(config, **own, **final)


def move(pipeline: Any, device: str | torch.device) -> Any:
    """``pipeline.to`` without diffusers' warnings that a CPU cannot compute in float16."""
    return pipeline.to(device, silence_dtype_warnings=True)


def load_backbone(teacher: Teacher, config: Config, device: str) -> Backbone:
    """The teacher's network alone: all that rollout and training need.

    Both see the same held weights, so that the student learns what few steps take and not what
    holding took away. Raises as :meth:`Teacher.load` does.
    """
    network, family = teacher.load_network(config.torch_dtype, device), teacher.family
    if config.base_precision != "same":
        quantize(network, family.lora_targets, config.base_precision)
    return Backbone(
        network,
        family.call,
        family.lora_targets,
        family.feature_layers(network),
        gradient_checkpointing=config.training.gradient_checkpointing,
    )


def weights_of(part: Path) -> list[Path]:
    """A part's files of weights: the plain ones; of variant fp16 where there are no others."""
    files = sorted(part.glob("*.safetensors"))
    return [file for file in files if ".fp16." not in file.name] or files

"""A teacher that `resolve.py` found, loaded part by part when a part is needed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from rapm.config import Config
from rapm.errors import UserError
from rapm.models import Family
from rapm.models.files import read_json, reading
from rapm.models.lora import Lora, fuse
from rapm.models.parts import Part
from rapm.models.schedulers import scheduler_of
from rapm.network import Backbone
from rapm.quantize import quantize
from rapm.schedule import Schedule
from rapm.toy import TEACHER as TOY


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
        return self._part(part).config()

    def _part(self, part: str) -> Part:
        return Part(self.source, self.folder, part)

    def latent_shape(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(C, h, w) of a picture of (width, height) pixels; None is the teacher's own size.

        Raises:
            UserError: this teacher cannot have that size.
        """
        with reading(self.source, f"{self.family.network} or vae"):  # configs of odd types
            try:
                return self.family.latent_shape(self.config, size)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"trajectories.size: {error}") from None

    @property
    def channels(self) -> int:
        """Of z."""
        return self.config(self.family.network)["in_channels"]

    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of this teacher's own pictures."""
        _, height, width = self.latent_shape(None)
        factor = self.family.packing * 2 ** (len(self.config("vae")["block_out_channels"]) - 1)
        return width * factor, height * factor

    def of_picture(self, size: tuple[int, int] | None, guidance_scale: float) -> dict[str, Tensor]:
        """Conditioning that depends on these alone, [1, ...]; None is the teacher's own size."""
        return self.family.of_picture(*(size or self.size()), guidance_scale)

    def student_guidance(self, guidance_scale: float) -> float:
        """What a student of this teacher at that scale is drawn at: none, unless it is told."""
        return guidance_scale if self.family.guidance_is_input else 1.0

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
        if self.checkpoint:
            with reading(self.source, " or ".join(parts)):
                pipeline = self.family.pipeline.from_single_file(
                    str(self.checkpoint),
                    config=str(self.folder),
                    local_files_only=True,
                    torch_dtype=precision,
                    **absent,
                )
        else:
            index = read_json(self.folder / "model_index.json")
            told = {name: index[name] for name in options if name in index} | absent
            built = {part: self._load_part(part, precision, device) for part in parts}
            pipeline = self.family.pipeline(**told, **built, scheduler=self.scheduler())
        move(pipeline, device)
        self._limit_tokens(pipeline, parts)
        for part in parts:
            self._check_finite(part, getattr(pipeline, part), precision)
        pipeline.set_progress_bar_config(disable=True)
        fusible = [part for part in parts if part.startswith((self.family.network, "text_encoder"))]
        for lora in self.loras:
            fuse(lora, {p: getattr(pipeline, p) for p in fusible}, self.family, self.source)
        return pipeline

    def _load_part(self, part: str, precision: torch.dtype, device: str) -> Any:
        return (
            self.draw(part, precision, device) if self.random else self._part(part).load(precision)
        )

    def _limit_tokens(self, pipeline: Any, parts: Sequence[str]) -> None:
        """A tokenizer cuts a prompt where the shortest of tokenizers and encoders ends; of some
        tokenizers nothing says where that is. Where a pipeline ends before, its family says so."""
        found = [getattr(pipeline, part) for part in parts if part.startswith("tokenizer")]
        encoders = [part for part in self.family.text_parts if part.startswith("text_encoder")]
        if found:
            with reading(self.source, "tokenizer"):
                configs = [self.config(part) for part in encoders]
                limits = [config.get("max_position_embeddings") for config in configs]
                limited = [t for t, limit in zip(found, limits, strict=True) if limit]
                lengths = (tokenizer.model_max_length for tokenizer in limited)
                least = min((*filter(None, limits), *lengths), default=0)
                for part, encoder in zip(self.family.text_parts, encoders, strict=False):
                    tokens, known = len(getattr(pipeline, part)), self.config(encoder)["vocab_size"]
                    if tokens > known:
                        raise ValueError(f"it has {tokens:,} tokens, its {encoder} {known:,}")
                    if getattr(pipeline, part).pad_token is None:
                        raise ValueError("it has no token to fill prompts up with (pad_token)")
            for tokenizer in limited:
                tokenizer.model_max_length = least
            if self.family.max_tokens:
                last = found[-1]
                last.model_max_length = min(last.model_max_length, self.family.max_tokens)
            if limited and hasattr(pipeline, "tokenizer_max_length"):  # read off a tokenizer before
                pipeline.tokenizer_max_length = least

    def _check_finite(self, part: str, loaded: Any, precision: torch.dtype) -> None:
        """
        Raises:
            UserError: a weight is no number.
        """
        if not isinstance(loaded, nn.Module) or loaded.device.type == "meta":
            return
        for name, value in loaded.state_dict().items():
            if not value.isfinite().all():
                half = " or too large for float16" if precision == torch.float16 else ""
                raise UserError(
                    f"teacher '{self.source}': '{name}' of its {part} is not finite: its weights "
                    f"are damaged{half}"
                )

    def load_tokenizers(self) -> list[Any]:
        """All that a prompt goes through, each with its own limit. Raises as :meth:`load` does."""
        parts = [part for part in self.family.text_parts if part.startswith("tokenizer")]
        pipeline = self.load(parts, torch.float32, "cpu")
        return [getattr(pipeline, part) for part in parts]

    def load_network(self, precision: torch.dtype, device: str) -> Any:
        """The denoising network, which is all that rollout and training need. Raises as
        :meth:`load` does."""
        return getattr(self.load_bare(precision, device), self.family.network)

    def load_bare(self, precision: torch.dtype, device: str) -> Any:
        """A pipeline of its network alone. Raises as :meth:`load` does.

        A stage leaves its network in cycles of hooks and adapted layers. Uncollected, the rollout's
        would stay on a GPU beside the one that is trained, and both beside the one for pictures.
        """
        gc.collect()
        return self.load([self.family.network], precision, device)

    def scheduler(self) -> Any:
        """The deterministic one, in diffusers' form."""
        return scheduler_of(self.config("scheduler"), self.schedule.shift)

    def backbone(self, network: Any, *, gradient_checkpointing: bool = False) -> Backbone:
        """Its network as one that adapters are added to."""
        family = self.family
        return Backbone(
            network,
            family.call,
            family.lora_targets,
            family.feature_layers(network),
            feature_map=family.feature_map,
            times=self.schedule.times,
            gradient_checkpointing=gradient_checkpointing,
        )

    def draw(self, part: str, precision: torch.dtype, device: str) -> Any:
        """A part with random weights (on the meta device without any); the tokenizer is the toy
        teacher's."""
        if part.startswith("tokenizer"):
            return transformers.CLIPTokenizer.from_pretrained(TOY / "tokenizer")
        return self._part(part).draw(precision, device)


def move(pipeline: Any, device: str | torch.device) -> Any:
    """``pipeline.to`` without diffusers' warnings that a CPU cannot compute in float16."""
    return pipeline.to(device, silence_dtype_warnings=True)


def load_backbone(teacher: Teacher, config: Config, device: str) -> Backbone:
    """The teacher's network alone: all that rollout, training and pictures of it need.

    All of them see the same held weights, so that the student learns what few steps take and not
    what holding took away. Raises as :meth:`Teacher.load` does, and where the settings name a LoRA
    target that no layer has.
    """
    if config.base_precision == "same":
        network = teacher.load_network(config.torch_dtype, device)
    else:
        network = teacher.load_network(config.torch_dtype, "meta" if device == "meta" else "cpu")
        quantize(network, config.base_precision, device)
    backbone = teacher.backbone(
        network, gradient_checkpointing=config.training.gradient_checkpointing
    )
    for targets in (config.student.targets, config.discriminators.targets):
        backbone.check_targets(targets)
    return backbone

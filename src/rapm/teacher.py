"""Teachers: whatever a user may name as one, found and fingerprinted at once, loaded part by part when a part is needed."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rapm.config import Config
from rapm.errors import UserError
from rapm.families import Family, families
from rapm.network import Backbone
from rapm.quantized import quantize
from rapm.schedule import PredictionType, Schedule
from rapm.toy import TEACHER as TOY

RANDOM = "random:"
LAYOUTS = Path(__file__).parent / "families" / "layouts"  # published architectures: configs without weights
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "random:sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "random:sdxl",
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_PLAIN_LORA = (".alpha", *(f".{half}.weight" for half in ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down", "lora.up")))
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_UNREADABLE = (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError, HfHubHTTPError)


@dataclass(frozen=True)
class Lora:
    """A LoRA that is fused into the teacher before anything else."""

    file: Path
    strength: float


@dataclass(frozen=True)
class Teacher:
    """A teacher that was found; nothing of it is loaded yet.

    Attributes:
        source: as the user gave it.
        folder: in diffusers' layout; what it holds beside configs and tokenizers depends on the next two.
        checkpoint: the single file that holds the weights, else they lie in the folder.
        random: there are no weights, they are drawn (always the same).
        loras: fused in this order.
        fingerprint: changes when the teacher does: of names, sizes and 64 KiB out of every 4 MiB of what is loaded.
    """

    source: str
    folder: Path
    checkpoint: Path | None
    random: bool
    loras: tuple[Lora, ...]
    family: Family
    schedule: Schedule
    fingerprint: str

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
        """A pipeline of these parts and no others: text parts to encode prompts, the VAE to see pictures.

        Raises:
            UserError: a part is missing or damaged, or a LoRA does not fit.
        """
        diffusers.utils.logging.disable_progress_bar()  # the libraries' own bars for loading would run into ours
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
                    str(self.checkpoint), config=str(self.folder), local_files_only=True, torch_dtype=precision, **absent
                )
            else:
                pipeline = self.family.pipeline.from_pretrained(
                    self.folder, dtype=precision, use_safetensors=True, variant=self._variant(parts), **absent
                )
            move(pipeline, device)
        except _UNREADABLE as error:
            raise UserError(f"teacher '{self.source}' cannot be loaded: {_first_line(error)}") from None
        pipeline.set_progress_bar_config(disable=True)
        fusible = [part for part in self.family.pipeline._lora_loadable_modules if part in parts]
        for lora in self.loras if fusible else ():
            self._fuse(pipeline, fusible, lora)
        return pipeline

    def _variant(self, parts: Sequence[str]) -> str | None:
        """fp16 when that is all that a part's folder has weights of."""
        weights = [file.name for part in parts for file in _weights(self.folder / part)]
        return "fp16" if any(".fp16." in name for name in weights) else None

    def load_tokenizers(self) -> list[Any]:
        """All that a prompt goes through, each with its own limit. Raises as :meth:`load` does."""
        parts = [part for part in self.family.text_parts if part.startswith("tokenizer")]
        pipeline = self.load(parts, torch.float32, "cpu")
        return [getattr(pipeline, part) for part in parts]

    def load_network(self, precision: torch.dtype, device: str) -> Any:
        """The denoising network, which is all that rollout and training need. Raises as :meth:`load` does.

        A stage leaves its network in cycles of hooks and adapted layers: uncollected, the rollout's would stay on a GPU beside
        the one that is trained, and both beside the one that pictures are drawn with.
        """
        gc.collect()
        return getattr(self.load([self.family.network], precision, device), self.family.network)

    def ddim_scheduler(self) -> Any:
        return ddim_scheduler(self.config("scheduler"))

    def draw(self, part: str, precision: torch.dtype, device: str) -> Any:
        """A part with random weights (on the meta device without any); the tokenizer is the toy teacher's."""
        if part.startswith("tokenizer"):
            return transformers.CLIPTokenizer.from_pretrained(TOY / "tokenizer")
        library, name = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))[part]
        kind, config = getattr(diffusers if library == "diffusers" else transformers, name), self.config(part)
        before = torch.get_default_dtype()
        torch.set_default_dtype(precision)
        try:
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                model = kind.from_config(config) if library == "diffusers" else kind(kind.config_class(**config))
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    def _fuse(self, pipeline: Any, parts: Sequence[str], lora: Lora) -> None:
        """diffusers passes over keys it does not know in silence; here every key must have found its place."""
        mixin, refused = type(pipeline), f"LoRA {lora.file} does not fit teacher '{self.source}'"
        config = SimpleNamespace(**self.config(self.family.network))
        loud = diffusers.utils.logging.get_verbosity()
        diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # its many lines of a mismatch would come before our one
        try:
            state, alphas, metadata = mixin.lora_state_dict(
                str(lora.file), unet_config=config, use_safetensors=True, return_lora_metadata=True
            )
            strangers = [key for key in state if not key.startswith(tuple(f"{p}." for p in mixin._lora_loadable_modules))]
            if strangers or not state:
                raise UserError(f"{refused}: {strangers[0] if strangers else 'the file'} belongs to no part of it")
            for part in parts:
                own = [key for key in state if key.startswith(f"{part}.")]
                if not own:
                    continue
                model = getattr(pipeline, part)
                given: dict[str, Any] = {"network_alphas": alphas, "adapter_name": "fused", "metadata": metadata}
                if part == self.family.network:
                    mixin.load_lora_into_unet(state, unet=model, **given)
                else:
                    mixin.load_lora_into_text_encoder(state, text_encoder=model, prefix=part, **given)
                placed = Counter(_digest(p) for name, p in model.named_parameters() if ".fused." in name)
                lost = Counter(_digest(state[key].to(model.dtype)) for key in own) - placed
                if lost:
                    raise UserError(f"{refused}: {lost.total()} of its {len(own)} tensors found no place in {part}")
            pipeline.fuse_lora(components=parts, lora_scale=lora.strength, safe_fusing=True)
            pipeline.unload_lora_weights()
        except UserError:
            raise
        except _UNREADABLE as error:
            raise UserError(f"{refused}: {_first_line(error)}") from None
        finally:
            diffusers.utils.logging.set_verbosity(loud)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def ddim_scheduler(config: Any) -> Any:
    """The DDIM scheduler of a teacher, whatever scheduler its config is of: its betas, trailing timesteps, nothing clipped.

    What a config of another scheduler leaves out is what Stable Diffusion has, and not what DDIMScheduler's defaults are.
    """
    final = {} if "set_alpha_to_one" in config else {"set_alpha_to_one": False}
    own = {"clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
    return diffusers.DDIMScheduler.from_config(config, **own, **final)


# --------------------------------------------------------------------------------------------------------------------- finding


def find_teacher(source: str, *, config: str = "", loras: Sequence[str] = ()) -> Teacher:
    """Finds a teacher.

    Args:
        source: ``toy``; a folder in diffusers' layout; a single .safetensors checkpoint; a hub id, ``owner/name`` or
            ``owner/name@revision``; ``random:sd15`` or ``random:sdxl``.
        config: of a single file: a folder in diffusers' layout whose configs and tokenizers are its own too. Without it they
            are those of the model it descends from, taken from the hub or its cache.
        loras: ``FILE`` or ``FILE:STRENGTH`` each.

    Raises:
        UserError: there is no such teacher, or it is of no known family.
    """
    path, checkpoint, random = Path(source), None, source.startswith(RANDOM)
    if source == "toy":
        folder = TOY
    elif random:
        folder = LAYOUTS / source.removeprefix(RANDOM)
        if not folder.is_dir():
            known = ", ".join(f"{RANDOM}{layout.name}" for layout in sorted(LAYOUTS.iterdir()))
            raise UserError(f"there is no architecture '{source}'; there are: {known}")
    elif path.suffix.lower() in _PICKLES:
        raise UserError(
            f"teacher '{source}' is a pickle, which may run code when it is opened; convert it to .safetensors first "
            "(on a machine you can spare: torch.load with weights_only=True, then safetensors.torch.save_file)"
        )
    elif path.suffix.lower() == ".safetensors":
        checkpoint, folder = path, _layout_of_checkpoint(path, config)
    elif path.is_dir():
        folder = path
    elif _HUB_ID.fullmatch(source):
        folder = _from_hub(*source.partition("@")[::2])
    else:
        raise UserError(
            f"teacher '{source}' is neither 'toy', nor a folder, nor a .safetensors file, nor a hub id (owner/name)"
        )
    if config and not checkpoint:
        raise UserError("teacher_config goes with a single .safetensors file only; this teacher brings its own configs")
    family = _family(source, folder)
    if not random:
        _check_parts(source, folder, family, weights=checkpoint is None)
    parts = tuple(_lora(text) for text in loras)
    files = [*([checkpoint] if checkpoint else []), *(lora.file for lora in parts)]
    mark = _fingerprint(folder, files, "".join(f"{lora.strength}," for lora in parts), weights=checkpoint is None)
    teacher = Teacher(source, folder, checkpoint, random, parts, family, _schedule(source, folder), mark)
    told = _header(checkpoint) if checkpoint else {}
    if "v_pred" in told and teacher.schedule.prediction_type != "v_prediction":
        raise UserError(
            f"teacher '{source}' says that it predicts v, its configs say '{teacher.schedule.prediction_type}'; name a folder "
            "whose scheduler has prediction_type v_prediction with --teacher-config"
        )
    if "ztsnr" in told and not teacher.config("scheduler").get("rescale_betas_zero_snr"):
        raise UserError(
            f"teacher '{source}' says that its noise leaves no signal at the end (ztsnr), its configs do not; name a folder "
            "whose scheduler has rescale_betas_zero_snr true with --teacher-config"
        )
    channels = teacher.config(family.network).get("in_channels"), teacher.config("vae").get("latent_channels")
    if None in channels:
        raise UserError(f"teacher '{source}': the config of its {family.network} or vae is incomplete")
    if channels[0] != channels[1]:
        raise UserError(
            f"teacher '{source}' takes {channels[0]} channels where its VAE gives {channels[1]}: an inpainting or editing "
            "model, not a text-to-image one"
        )
    return teacher


def teacher_of(config: Config) -> Teacher:
    """A run's teacher; raises as :func:`find_teacher` does."""
    return find_teacher(config.teacher, config=config.teacher_config, loras=config.teacher_loras)


def architecture_of(config: Config) -> Teacher:
    """A run's teacher for planning: of the published models the shipped configs are enough, so nothing is downloaded."""
    published = PUBLISHED.get(config.teacher.partition("@")[0])
    return replace(find_teacher(published), source=config.teacher) if published else teacher_of(config)


def move(pipeline: Any, device: str | torch.device) -> Any:
    """``pipeline.to`` without diffusers' warnings that a CPU cannot compute in float16: it can, or the part just waits."""
    return pipeline.to(device, silence_dtype_warnings=True)


def load_backbone(teacher: Teacher, config: Config, device: str) -> Backbone:
    """The teacher's network alone, with its taps: all that rollout and training need. Raises as :meth:`Teacher.load` does.

    Both see the same held weights, so that the student learns what few steps take and not what holding took away.
    """
    network, family, training = teacher.load_network(config.torch_dtype, device), teacher.family, config.training
    if config.base_precision != "same":
        quantize(network, family.lora_targets, config.base_precision)
    return Backbone(
        network,
        family.call,
        family.lora_targets,
        family.taps(network),
        gradient_checkpointing=training.gradient_checkpointing,
        channels_last=training.channels_last,
    )


def _family(source: str, folder: Path) -> Family:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"teacher '{source}' is no folder in diffusers' layout (no model_index.json in it)")
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"teacher '{source}': its model_index.json is damaged") from None
    known = {family.pipeline.__name__: family for family in families()}
    if name not in known:
        raise UserError(f"teacher '{source}' is a {name}; this version distils {', '.join(known)}")
    return known[name]


def _check_parts(source: str, folder: Path, family: Family, *, weights: bool) -> None:
    """Whether everything that will be loaded in the end is there: nobody wants to hear of it after the rollout."""
    for part in (family.network, "vae", *family.text_parts, "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"teacher '{source}' is incomplete: it has no {part}")
        if weights and not part.startswith(("tokenizer", "scheduler")) and not any((folder / part).glob("*.safetensors")):
            pickled = any((folder / part).glob("*.bin"))
            hint = ", only pickled ones, which are not read; save it anew with safe_serialization=True" if pickled else ""
            raise UserError(f"teacher '{source}' is incomplete: its {part} has no .safetensors weights{hint}")
        if part.startswith("tokenizer") and not any(
            (folder / part / name).is_file() for name in ("vocab.json", "tokenizer.json")
        ):
            raise UserError(f"teacher '{source}' is incomplete: its {part} has no vocabulary")


def _schedule(source: str, folder: Path) -> Schedule:
    try:
        config: Any = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler")
        scheduler = ddim_scheduler(config)
    except (OSError, ValueError):
        raise UserError(f"teacher '{source}' has no readable scheduler/scheduler_config.json") from None
    if not {"beta_start", "trained_betas"} & {*config}:
        name = config.get("_class_name", "scheduler")
        raise UserError(
            f"teacher '{source}' has a {name}, which has no betas (flow matching?); this version distils DDPM-style models"
        )
    kind, timesteps = scheduler.config["prediction_type"], len(scheduler.alphas_cumprod)
    if kind not in get_args(PredictionType) or timesteps != 1000:
        raise UserError(
            f"teacher '{source}' predicts '{kind}' over {timesteps} timesteps; "
            f"this version distils {', '.join(get_args(PredictionType))} over 1000"
        )
    if kind == "epsilon" and scheduler.config["rescale_betas_zero_snr"]:
        raise UserError(
            f"teacher '{source}' predicts the noise where there is nothing but noise (zero terminal SNR with epsilon)"
        )
    return Schedule.of(scheduler.alphas_cumprod, scheduler.final_alpha_cumprod, kind)


def _lora(text: str) -> Lora:
    """``FILE`` or ``FILE:STRENGTH``."""
    name, _, last = text.rpartition(":")
    try:
        file, strength = (Path(name), float(last)) if name else (Path(text), 1.0)
    except ValueError:  # the colon belongs to the path
        file, strength = Path(text), 1.0
    if file.suffix.lower() in _PICKLES:
        raise UserError(f"LoRA {file} is a pickle, which may run code when it is opened; convert it to .safetensors first")
    if not file.is_file():
        raise UserError(f"there is no LoRA file {file}; write FILE or FILE:STRENGTH")
    strange = [name for name in _header(file) if not name.endswith(_PLAIN_LORA)]
    if strange:  # diffusers drops some of these without a word
        raise UserError(f"LoRA {file} holds '{strange[0]}', which is no plain LoRA's (a DoRA, LoHa, LoKr or another kind)")
    return Lora(file, strength)


def _header(file: Path) -> dict[str, Tensor]:
    """A file's tensors as shapes without values.

    Raises:
        UserError: it is not there, or no safetensors file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in names}
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except (SafetensorError, OSError):
        raise UserError(f"{file} is damaged, or no safetensors file") from None


def _layout_of_checkpoint(file: Path, config: str) -> Path:
    """The folder with a single file's configs and tokenizers.

    Raises:
        UserError: the file is no whole checkpoint of a known family, or its configs cannot be had.
    """
    header = _header(file)
    try:
        kind = infer_diffusers_model_type(header)
    except KeyError:  # it looks into tensors that one of the kinds it half recognises does not have
        raise UserError(f"teacher '{file}' is no checkpoint of a known kind") from None
    known = {name: family for family in families() for name in family.single_file}
    parts = {
        "a denoising network": ("model.diffusion_model.",),
        "a VAE": ("first_stage_model.",),
        "a text encoder": ("cond_stage_model.", "conditioner.embedders."),
    }
    missing = [part for part, prefixes in parts.items() if not any(name.startswith(prefixes) for name in header)]
    if kind not in known:
        raise UserError(f"teacher '{file}' looks like '{kind}'; of single files this version distils {', '.join(known)}")
    if missing:  # "v1" is what diffusers calls whatever it does not know
        raise UserError(f"teacher '{file}' is no whole checkpoint: there is no {' and no '.join(p[2:] for p in missing)} in it")
    if config:
        if _family(config, Path(config)) is not known[kind]:
            raise UserError(f"teacher '{file}' is '{kind}', and the configs in {config} are of another family")
        return Path(config)
    if kind == "v2":
        raise UserError(
            f"teacher '{file}' is of Stable Diffusion 2, and such a file does not say whether it predicts noise or v; name a "
            "folder in diffusers' layout that does with --teacher-config"
        )
    repository = fetch_diffusers_config(header)["pretrained_model_name_or_path"]
    try:
        return Path(_first_cached(snapshot_download, repository, allow_patterns=["*.json", "*/*.json", "*/*.txt"]))
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise UserError(
            f"teacher '{file}' is '{kind}', whose configs and tokenizer are those of {repository}; that is not in the cache "
            f"and cannot be downloaded ({_first_line(error)}); name a folder in diffusers' layout of the same kind with "
            "--teacher-config"
        ) from None


def _first_cached(download: Any, repository: str, **given: Any) -> Any:
    """From the cache if it is there, so that a run goes on where there is no network, and with what it began with."""
    try:
        return download(repository, local_files_only=True, **given)
    except (OSError, ValueError):
        return download(repository, **given)


def _from_hub(repository: str, revision: str) -> Path:
    left_out = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    given = {"revision": revision or None, "use_safetensors": True, **left_out}
    try:
        folder = Path(_first_cached(diffusers.DiffusionPipeline.download, repository, **given))
        try:
            _check_parts(repository, folder, _family(repository, folder), weights=True)
        except UserError:  # a download that was stopped half-way is in the cache too
            folder = Path(diffusers.DiffusionPipeline.download(repository, **given))
        return folder
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise UserError(
            f"teacher '{repository}' is no folder here, not in the hub's cache, and cannot be downloaded: {_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    """Of what began it all; torch's "Error(s) in loading ...:" says nothing before its second line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    if "ignore_mismatched_sizes" in lines[0]:
        return "tensors have other shapes than its layers"
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]


@cache
def _sample(file: Path, size: int, changed: int) -> str:
    """Of 64 KiB out of every 4 MiB: a teacher may weigh gigabytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for offset in range(0, size, 1 << 22):
            stream.seek(offset)
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def _weights(part: Path) -> list[Path]:
    """A part's files of weights: the plain ones, those of variant fp16 where there are no others."""
    files = sorted(part.glob("*.safetensors"))
    return [file for file in files if ".fp16." not in file.name] or files


def _fingerprint(folder: Path, files: Sequence[Path], extra: str, *, weights: bool) -> str:
    """Of what a trajectory depends on: configs and tokenizers, the folder's weights if it is they that are loaded, and the
    other files that weights come from. What else is in the folder, or comes into the hub's cache later, does not count."""
    digest = hashlib.sha256(extra.encode())
    parts = ("unet", "transformer", "text_encoder", "tokenizer", "scheduler")
    chosen: dict[str, Path] = {}
    for part in folder.iterdir():
        if part.is_dir() and part.name.startswith(parts):
            texts = [f for f in part.rglob("*") if f.suffix in (".json", ".txt", ".model") and ".index." not in f.name]
            loaded = _weights(part) if weights else []
            chosen |= {file.relative_to(folder).as_posix(): file for file in (*texts, *loaded)}
    for name, file in [*sorted(chosen.items()), *((f"file {k}", file) for k, file in enumerate(files))]:
        status = file.stat()
        digest.update(f"{name} {status.st_size} {_sample(file, status.st_size, status.st_mtime_ns)} ".encode())
    return digest.hexdigest()

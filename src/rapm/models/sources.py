"""Where a teacher's configs and weights are: a single file, the hub or its cache, a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config, infer_diffusers_model_type
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rapm.errors import UserError, first_line
from rapm.models import Family, families


def layout_of_checkpoint(file: Path, config: str) -> Path:
    """The folder with a single file's configs and tokenizers.

    Raises:
        UserError: the file is no whole checkpoint of a known family, or its configs cannot be had.
    """
    header = header_of(file)
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
    missing = [
        part
        for part, prefixes in parts.items()
        if not any(name.startswith(prefixes) for name in header)
    ]
    if kind not in known:
        raise UserError(
            f"teacher '{file}' looks like '{kind}'; of single files this version distils "
            f"{', '.join(known)}"
        )
    if missing:  # "v1" is what diffusers calls whatever it does not know
        raise UserError(
            f"teacher '{file}' is no whole checkpoint: there is no "
            f"{' and no '.join(p[2:] for p in missing)} in it"
        )
    if config:
        if family_of(config, Path(config)) is not known[kind]:
            raise UserError(
                f"teacher '{file}' is '{kind}', and the configs in {config} are of another family"
            )
        return Path(config)
    if kind == "v2":
        raise UserError(
            f"teacher '{file}' is of Stable Diffusion 2, and such a file does not say whether it "
            f"predicts noise or v; name a "
            "folder in diffusers' layout that does with --teacher-config"
        )
    repository = fetch_diffusers_config(header)["pretrained_model_name_or_path"]
    wanted = ["*.json", "*/*.json", "*/*.txt"]
    try:
        folder = Path(_first_cached(snapshot_download, repository, allow_patterns=wanted))
        try:
            check_parts(repository, folder, family_of(repository, folder), weights=False)
        except UserError:  # some other program has fetched a part of it
            folder = Path(snapshot_download(repository, allow_patterns=wanted))
        return folder
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise UserError(
            f"teacher '{file}' is '{kind}', whose configs and tokenizer are those of {repository}; "
            f"that is not in the cache "
            f"and cannot be downloaded ({first_line(error)}); name a folder in diffusers' layout "
            f"of the same kind with "
            "--teacher-config"
        ) from None


def from_hub(repository: str, revision: str) -> Path:
    left_out = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    given = {"revision": revision or None, "use_safetensors": True, **left_out}
    try:
        folder = Path(_first_cached(diffusers.DiffusionPipeline.download, repository, **given))
        try:
            check_parts(repository, folder, family_of(repository, folder), weights=True)
        except UserError:  # a download that was stopped half-way is in the cache too
            folder = Path(diffusers.DiffusionPipeline.download(repository, **given))
        return folder
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise UserError(
            f"teacher '{repository}' is no folder here, not in the hub's cache, and cannot be "
            f"downloaded: {first_line(error)}"
        ) from None


def _first_cached(download: Any, repository: str, **given: Any) -> Any:
    """From the cache if it is there, so that a run goes on where there is no network, and with what
    it began with."""
    try:
        return download(repository, local_files_only=True, **given)
    except (OSError, ValueError):
        return download(repository, **given)


def family_of(source: str, folder: Path) -> Family:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"teacher '{source}' is no folder in diffusers' layout (no model_index.json in it)"
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"teacher '{source}': its model_index.json is damaged") from None
    known = {family.pipeline.__name__: family for family in families()}
    if name not in known:
        raise UserError(f"teacher '{source}' is a {name}; this version distils {', '.join(known)}")
    return known[name]


def check_parts(source: str, folder: Path, family: Family, *, weights: bool) -> None:
    """Whether everything that will be loaded in the end is there: nobody wants to hear of it after
    the rollout."""
    for part in (family.network, "vae", *family.text_parts, "scheduler"):
        if not (folder / part).is_dir():
            raise UserError(f"teacher '{source}' is incomplete: it has no {part}")
        if (
            weights
            and not part.startswith(("tokenizer", "scheduler"))
            and not any((folder / part).glob("*.safetensors"))
        ):
            pickled = any((folder / part).glob("*.bin"))
            hint = (
                ", only pickled ones, which are not read; save it anew with safe_serialization=True"
                if pickled
                else ""
            )
            raise UserError(
                f"teacher '{source}' is incomplete: its {part} has no .safetensors weights{hint}"
            )
        if part.startswith("tokenizer") and not any(
            (folder / part / name).is_file() for name in ("vocab.json", "tokenizer.json")
        ):
            raise UserError(f"teacher '{source}' is incomplete: its {part} has no vocabulary")


def header_of(file: Path) -> dict[str, Tensor]:
    """A file's tensors as shapes without values.

    Raises:
        UserError: it is not there, or no safetensors file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            return {
                name: torch.empty(tensors.get_slice(name).get_shape(), device="meta")
                for name in names
            }
    except FileNotFoundError:
        raise UserError(f"there is no file {file}") from None
    except (SafetensorError, OSError):
        raise UserError(f"{file} is damaged, or no safetensors file") from None

"""Where a teacher's configs and weights are: a single file, the hub or its cache, a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    fetch_diffusers_config,
    infer_diffusers_model_type,
    is_clip_model_in_single_file,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from rapm.errors import UserError, first_line
from rapm.models import Family, families
from rapm.models.files import header_of, read_json, reading
from rapm.models.parts import Part, parts_of

_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
# How the names of tensors in an original checkpoint end; what training left there is not looked at.
_PLAIN = ("weight", "bias", "in_proj_weight", "in_proj_bias", "text_projection")
_PLAIN += ("positional_embedding", "position_ids", "attn_mask", "logit_scale")
_LEFT = re.compile(r"\.(loss|model_ema)\.")


def layout_of_checkpoint(file: Path, config: str) -> Path:
    """The folder with a single file's configs and tokenizers.

    Raises:
        UserError: the file is no whole checkpoint of a known family, or its configs cannot be had.
    """
    header = header_of(file)
    try:
        kind = infer_diffusers_model_type(header)
    except (
        LookupError
    ):  # it looks into tensors that one of the kinds it half recognises does not have
        raise UserError(f"teacher '{file}' is no checkpoint of a known kind") from None
    known = {name: family for family in families() for name in family.single_file}
    parts = {
        "a denoising network": ("model.diffusion_model.",),
        "a VAE": ("first_stage_model.",),
        "a text encoder": ("cond_stage_model.", "conditioner.embedders."),
    }
    if any(name.startswith("conditioner.") for name in header):  # which has two
        parts["a second text encoder"] = ("conditioner.embedders.1.",)
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
        name = read_json(index)["_class_name"]
    except (ValueError, KeyError) as error:
        told = f" ({error})" if "cannot be read" in str(error) else ""
        raise UserError(f"teacher '{source}': its model_index.json is damaged{told}") from None
    known = {family.pipeline.__name__: family for family in families()}
    if not isinstance(name, str) or name not in known:
        raise UserError(f"teacher '{source}' is a {name}; this version distils {', '.join(known)}")
    return known[name]


def check_parts(source: str, folder: Path, family: Family, *, weights: bool) -> None:
    """Looks at every part, see :meth:`Part.check`."""
    for part in parts_of(source, folder, family):
        part.check(weights=weights)


def check_checkpoint(file: Path, folder: Path, family: Family) -> None:
    """Holds a single file's tensors against the configs that go with it.

    diffusers' own conversion is run on the header; it passes over what it does not know.

    Raises:
        UserError: one is missing, finds no place, or has another shape.
    """
    header = header_of(file)
    for part in parts_of(str(file), folder, family):
        prefixes = _PREFIXES.get(part.name, ())
        own = [name for name in header if name.startswith(prefixes) and not _LEFT.search(name)]
        if not own:
            continue
        with reading(str(file), part.name):
            placed = _placed(part, header)
        names = {id(tensor): name for name, tensor in header.items()}
        origin = {place: names.get(id(_whole(x)), place) for place, x in placed.items()}
        part.check_tensors(placed, origin.__getitem__)
        strange = [name for name in own if name.rpartition(".")[2] not in _PLAIN]
        if not part.name.startswith("text_encoder"):  # of which the conversion copies some
            found = {origin[place] for place in part.expected()}
            strange += [name for name in own if name not in found]
        if strange:
            raise part.out_of_place(strange)


def _placed(part: Part, header: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part by their places in diffusers' model of it."""
    if part.name == "unet":
        return convert_ldm_unet_checkpoint(dict(header), part.config())
    if part.name == "vae":
        return convert_ldm_vae_checkpoint(dict(header), part.config())
    if not is_clip_model_in_single_file(part.kind(), header):
        raise ValueError("its tensors have names that diffusers does not read")
    prefix = f"{_PREFIXES[part.name][0]}model."
    if any(name.startswith(prefix) for name in header):
        found = convert_open_clip_checkpoint(part.layout(), dict(header), prefix)
    else:
        found = convert_ldm_clip_checkpoint(dict(header))
    return {name.removeprefix("text_model."): tensor for name, tensor in found.items()}


def _whole(tensor: Tensor) -> Tensor:
    """What a slice is of."""
    return tensor if tensor._base is None else tensor._base

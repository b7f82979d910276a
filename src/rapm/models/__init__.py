"""Model families: what a kind of diffusers pipeline needs told. One file each; docs/families.md
shows how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rapm.network import FeatureMap
from rapm.sampling import Conditioning


@dataclass(frozen=True)
class Family:
    """What the library must know of a kind of pipeline. A pipeline it is handed has the parts that
    were asked for, no others.

    Attributes:
        pipeline: the diffusers pipeline class.
        network: the part that denoises.
        text_parts: the parts that encode prompts.
        single_file: what diffusers calls an original checkpoint of this kind; empty where there is
            none.
        lora_targets: names of the modules that get LoRA: all attention, feed-forward and
            convolution layers.
        lora_names: ``(network) -> {module's path: name}`` in kohya's files, without ``lora_unet_``,
            for each naming that such files have; the first is written. None where other programs
            read diffusers' file, so ().
        feature_layers: paths of the modules whose outputs discriminators read, in a network.
        feature_map: ``(output, z) -> map [B, C, h, w]`` of such a module's output.
        call: runs the network: ``(network, z, t, conditioning) -> prediction``.
        served: of a part's config, the fields that change what ``call``, ``encode`` or ``decode``
            would have to give, each with the values that they serve; what is left out has the
            first. ``_class_name`` is the part's class.
        encode: ``(pipeline, prompts) -> conditioning`` of each prompt, tensors [n, ...] on the CPU.
        unconditional: ``(pipeline, negative prompt) -> conditioning`` that guidance leads away
            from, [1, ...] on the CPU; {} where guidance is an input of the network.
        of_picture: ``(width, height, guidance scale) -> conditioning`` that depends on these alone,
            tensors [1, ...]; {} for none.
        conditioning: ``(configs) -> shape`` of each tensor that ``encode`` gives a prompt; known
            without loading anything.
        latent_shape: ``(configs, (width, height) in pixels, or None for the network's own) -> (C,
            h, w)``; ``configs`` gives a part's config by its name. Raises ValueError for a size the
            network cannot have.
        decode: ``(pipeline, z [n, C, h, w]) -> images``, float32 [n, 3, H, W] in [-1, 1], on the
            CPU.
        base_model: ``(configs) ->`` what a LoRA's metadata call a model of this kind: kohya's
            ``ss_base_model_version`` and Stability AI's ``modelspec.architecture``.
        flow: it is rectified flow, whose schedulers have shifts, and not betas.
        packing: a cell of z is a square of so many of the VAE's latents a side.
        shift: ``(scheduler's config, patches of a picture) -> shift`` of a flow whose scheduler
            says ``use_dynamic_shifting``.
        max_tokens: where the pipeline cuts a prompt, of the text encoder that reads furthest; 0 is
            where its tokenizers end.
        guidance_is_input: the network is told the guidance scale, in one pass; so is the student.
        pipeline_guidance: what the pipeline is to be called with for a guidance scale, where 1 is
            none.
    """

    pipeline: type[Any]
    network: str
    text_parts: tuple[str, ...]
    single_file: tuple[str, ...]
    lora_targets: tuple[str, ...]
    lora_names: Callable[[nn.Module], tuple[dict[str, str], ...]]
    feature_layers: Callable[[nn.Module], list[str]]
    feature_map: FeatureMap
    call: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    served: Mapping[str, Mapping[str, tuple[Any, ...]]]
    encode: Callable[[Any, Sequence[str]], dict[str, Tensor]]
    unconditional: Callable[[Any, str], dict[str, Tensor]]
    conditioning: Callable[[Configs], dict[str, tuple[int, ...]]]
    latent_shape: Callable[[Configs, tuple[int, int] | None], tuple[int, int, int]]
    decode: Callable[[Any, Tensor], Tensor]
    base_model: Callable[[Configs], tuple[str, str]]
    pipeline_guidance: Callable[[float], float] = float
    of_picture: Callable[[int, int, float], dict[str, Tensor]] = lambda width, height, scale: {}
    flow: bool = False
    max_tokens: int = 0
    guidance_is_input: bool = False
    packing: int = 1
    shift: Callable[[Mapping[str, Any], int], float] | None = None


Configs = Callable[[str], Mapping[str, Any]]


def families() -> list[Family]:
    """All that there are."""
    from rapm.models import chroma, flux, flux2, sd3, sdxl, stable_diffusion, z_image

    modules = (stable_diffusion, sdxl, sd3, z_image, flux2, flux, chroma)
    return [module.FAMILY for module in modules]

"""Small pipelines written as the original single-file checkpoints: the way back from what
``from_single_file`` does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_shortcut": "nin_shortcut",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def _rename(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = re.sub(rf"(^|\.){re.escape(new)}(\.|$)", rf"\g<1>{old}\g<2>", name)
    return name


def unet_name(name: str, config: Any) -> str:
    """``down_blocks.0.resnets.1.conv1.weight`` -> ``input_blocks.2.0.in_layers.2.weight``."""
    layers = config["layers_per_block"]
    found = re.match(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(conv\.)?(.*)",
        name,
    )
    if found is None:
        name = _rename(name, _UNET)
    else:
        way, block, kind, layer, conv, rest = found.groups()
        block, layer = int(block), int(layer)
        if way == "down":
            number = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
            name = (
                f"input_blocks.{number}.{int(kind == 'attentions')}.{'op.' if conv else ''}{rest}"
            )
        else:
            number = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
            attends = config["up_block_types"][block].startswith("CrossAttn")
            place = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[kind]
            name = f"output_blocks.{number}.{place}.{conv or ''}{rest}"
    return _rename(name, _RESNET) if not re.search(r"transformer_blocks|^out\.", name) else name


def vae_name(name: str, blocks: int) -> str:
    found = re.match(
        r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets\.|downsamplers\.0|upsamplers\.0)(.*)",
        name,
    )
    if found:
        coder, way, block, kind, rest = found.groups()
        number = int(block) if way == "down" else blocks - 1 - int(block)
        kind = {"resnets.": "block.", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}[
            kind
        ]
        name = f"{coder}.{way}.{number}.{kind}{rest}"
    return _rename(name, _VAE)


def _open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif "_proj." in name and "out_proj" not in name:
            if "q_proj" in name:
                parts = [
                    state[key]
                    for key in (("text_model." if "text_model." + name in state else "") + name,)
                ]
                parts += [
                    state[next(k for k in state if k.endswith(name.replace("q_proj", p)))]
                    for p in ("k_proj", "v_proj")
                ]
                new = re.sub(
                    r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.",
                    r"transformer.resblocks.\1.attn.in_proj_",
                    name,
                )
                out[new] = torch.cat(parts)
        else:
            out[
                re.sub(r"^encoder\.layers\.", "transformer.resblocks.", _rename(name, _OPEN_CLIP))
            ] = value
    return out


def save_single_file(pipeline: Any, file: Path) -> None:
    """Writes unet, VAE and text encoders of a small Stable Diffusion 1.x, 2.x or XL pipeline into
    one original checkpoint."""
    tensors = {
        f"model.diffusion_model.{unet_name(name, pipeline.unet.config)}": value
        for name, value in pipeline.unet.state_dict().items()
    }
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, value in pipeline.vae.state_dict().items():
        attention = (
            "mid_block.attentions" in name and name.endswith("weight") and "group_norm" not in name
        )
        tensors[f"first_stage_model.{vae_name(name, blocks)}"] = (
            value[:, :, None, None] if attention else value
        )

    def hugging_face(part: Any) -> dict[str, Tensor]:
        return {
            f"text_model.{name.removeprefix('text_model.')}": value
            for name, value in part.state_dict().items()
        }

    first = pipeline.text_encoder
    if getattr(pipeline, "text_encoder_2", None) is not None:
        second = _open_clip(pipeline.text_encoder_2.state_dict())
        tensors |= {
            f"conditioner.embedders.0.transformer.{name}": value
            for name, value in hugging_face(first).items()
        }
        tensors |= {
            f"conditioner.embedders.1.model.{name}": value for name, value in second.items()
        }
    elif pipeline.unet.config.cross_attention_dim == 1024:
        tensors |= {
            f"cond_stage_model.model.{name}": value
            for name, value in _open_clip(first.state_dict()).items()
        }
    else:
        tensors |= {
            f"cond_stage_model.transformer.{name}": value
            for name, value in hugging_face(first).items()
        }
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)

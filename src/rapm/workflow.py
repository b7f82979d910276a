"""A workflow for ComfyUI, in the form of its API; dropped onto its page it opens as nodes."""

from __future__ import annotations

from typing import Any

WORKFLOW = "comfyui_workflow.json"


def workflow(checkpoint: str, lora: str, steps: int, size: tuple[int, int]) -> dict[str, Any]:
    """Of a checkpoint of Stable Diffusion with a student's LoRA, at its own timesteps.

    Args:
        checkpoint: the teacher's file among ComfyUI's checkpoints.
        lora: the LoRA's file among its LoRAs.
        size: of the picture, (width, height).
    """
    model, clip, vae = (["1", k] for k in range(3))
    adapted, read = (["2", k] for k in range(2))
    width, height = size
    nodes: list[tuple[str, dict[str, Any]]] = [
        ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        (
            "LoraLoader",
            {
                "model": model,
                "clip": clip,
                "lora_name": lora,
                "strength_model": 1.0,
                "strength_clip": 1.0,
            },
        ),
        ("CLIPTextEncode", {"clip": read, "text": "a prompt"}),
        ("CLIPTextEncode", {"clip": read, "text": ""}),  # not read at cfg 1
        ("EmptyLatentImage", {"width": width, "height": height, "batch_size": 1}),
        (
            "KSampler",
            {
                "model": adapted,
                "positive": ["3", 0],
                "negative": ["4", 0],
                "latent_image": ["5", 0],
                "seed": 0,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        ),
        ("VAEDecode", {"samples": ["6", 0], "vae": vae}),
        ("SaveImage", {"images": ["7", 0], "filename_prefix": lora.rpartition(".")[0]}),
    ]
    return {str(k): {"class_type": kind, "inputs": own} for k, (kind, own) in enumerate(nodes, 1)}

"""What published networks see in pictures: Inception's features for FID and KID, and how well a
picture fits its text by CLIP and by PickScore. All from local files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rapm.errors import UserError, first_line
from rapm.io import sha256

INCEPTION = "inception-2015-12-05.pt"
CLIP, PICKSCORE = "clip", "pickscore"  # folders in transformers' layout
SIDE = 299  # pixels of a picture that Inception reads
WHERE = f"""{INCEPTION} is NVIDIA's export of the standard network, the one that clean-fid uses; \
{CLIP}/ and {PICKSCORE}/ are folders of a CLIPModel with its tokenizer and preprocessor"""
# Bytes of published weights in float32, for a plan: Inception, CLIP ViT-B/32, PickScore ViT-H/14.
BYTES = {"Inception": 96 << 20, "CLIP": 605 << 20, "PickScore": 3945 << 20}


def resized(picture: Image.Image, width: int, height: int) -> Tensor:
    """clean-fid's "clean" resize (arXiv 2104.11222): Pillow's bicubic on each channel as float32,
    which smooths before it takes pixels away. Float32 [3, height, width] in [0, 255]."""
    channels = (Image.fromarray(np.asarray(c, np.float32)) for c in picture.split())
    scaled = [c.resize((width, height), Image.Resampling.BICUBIC) for c in channels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in scaled])).clamp(0, 255)


def centre(picture: Image.Image) -> Image.Image | None:
    """The middle :data:`SIDE` pixels each way, for patch FID (arXiv 2307.01952); None where there
    are fewer."""
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    return picture.crop((left, top, left + SIDE, top + SIDE)) if min(left, top) >= 0 else None


@contextmanager
def there(network: Any, device: torch.device) -> Iterator[None]:
    """Has a network on a device while it reads; there is other work for that memory."""
    network.to(device)
    try:
        yield
    finally:
        network.to("cpu")


class Inception:
    """The standard Inception network of FID, from its TorchScript file.

    Raises:
        UserError: there is no such file, or it is another network.
    """

    def __init__(self, file: Path, device: str) -> None:
        self.device, self._network = torch.device(device), _torchscript(file)
        self.mark = sha256(file)
        try:
            features = self([Image.new("RGB", (SIDE, SIDE))] * 2)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"{file} is another network: {first_line(error)}") from None
        if len(features) != 2 or features.shape[1] < 2 or not features.isfinite().all():
            raise UserError(f"{file} is another network: it has no finite features [2, d > 1]")
        self.dimensions = features.shape[1]

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of pictures of any size, float32 [n, d]."""
        values = torch.stack([resized(picture, SIDE, SIDE) for picture in pictures])
        with there(self._network, self.device):
            found = self._network.layers((values.to(self.device) - 128) / 128)
            return found.flatten(1).float().cpu()


def _torchscript(file: Path) -> Any:
    if not file.is_file():
        raise UserError(f"there is no {file}; put it there: {WHERE}")
    try:
        return torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{file} is no TorchScript file: {first_line(error)}") from None


class TextFit:
    """How well pictures fit their texts, by a CLIP model: 100 times the cosine of their embeddings.
    PickScore (arXiv 2305.01569) is that with the model's own factor.

    Args:
        folder: in transformers' layout: model, tokenizer, preprocessor.
        prefix: put before every text.

    Raises:
        UserError: the folder holds none of this.
    """

    def __init__(
        self, folder: Path, device: str, *, prefix: str = "", own_factor: bool = False
    ) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self.device, self.prefix = torch.device(device), prefix
        try:
            local: dict[str, Any] = {"local_files_only": True}
            self._model: Any = CLIPModel.from_pretrained(folder, use_safetensors=True, **local)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
            self._processor = CLIPImageProcessor.from_pretrained(folder, **local)
            self._model.eval()
            # Of all that it was loaded from: shards, tokenizer, how pictures are prepared.
            files = sorted(
                file
                for file in folder.iterdir()
                if file.suffix in (".json", ".safetensors", ".txt")
            )
            told = [[file.name, sha256(file)] for file in files]
            self.mark = hashlib.sha256(json.dumps(told).encode()).hexdigest()
            factor = self._model.logit_scale.detach().exp()
            self.factor = float(factor) if own_factor else 100.0
            self([Image.new("RGB", (64, 64))], ["a"])
        except Exception as error:  # of a folder that holds anything
            raise UserError(f"{folder} holds no CLIP model: {first_line(error)}") from None

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Float32 [n]."""
        values = self._processor(list(pictures), return_tensors="pt")["pixel_values"]
        tokens = self._tokenizer(
            [self.prefix + text for text in texts],
            padding="max_length",
            max_length=self._model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )
        with there(self._model, self.device):
            seen = self._model.get_image_features(pixel_values=values.to(self.device))
            said = self._model.get_text_features(**tokens.to(self.device))
            fit = torch.cosine_similarity(seen.pooler_output, said.pooler_output)
            return self.factor * fit.float().cpu()


class Reader:
    """Reads pictures by all the networks that a folder of weights has.

    Args:
        weights: the folder; Inception must be there, CLIP and PickScore may be.
        prefix: before every text that CLIP reads.
    """

    def __init__(self, weights: Path, device: str, prefix: str = "") -> None:
        if not weights.is_dir():
            raise UserError(f"there is no folder {weights}; it takes {WHERE}")
        self.inception, self.prefix = Inception(weights / INCEPTION, device), prefix
        self.text_fits: dict[str, TextFit] = {}
        if (weights / CLIP).is_dir():
            self.text_fits["clip"] = TextFit(weights / CLIP, device, prefix=prefix)
        if (weights / PICKSCORE).is_dir():
            self.text_fits["pickscore"] = TextFit(weights / PICKSCORE, device, own_factor=True)
        self.absent = [
            folder
            for folder, name in ((CLIP, "clip"), (PICKSCORE, "pickscore"))
            if name not in self.text_fits
        ]

    @property
    def marks(self) -> dict[str, str]:
        """Each network's name, and the beginning of a SHA-256 of its files."""
        found = {"inception": self.inception.mark}
        found |= {name: fit.mark for name, fit in self.text_fits.items()}
        return {name: mark[:12] for name, mark in found.items()}

    @property
    def facts(self) -> list[Any]:
        """All that what is read depends on besides the pictures."""
        return [self.marks, self.prefix, version("rapm")]

    def __call__(
        self, pictures: Sequence[Image.Image], texts: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """``features`` [n, d]; where every picture has them, ``patches`` [n, d], of its centre; and
        with texts ``clip`` and ``pickscore`` [n], where there is such a model."""
        found = {"features": self.inception(pictures)}
        patches = [patch for picture in pictures if (patch := centre(picture))]
        if len(patches) == len(pictures):
            found["patches"] = self.inception(patches)
        if texts:
            found |= {name: fit(pictures, texts) for name, fit in self.text_fits.items()}
        return found

"""LoRA files that were written, read back by diffusers into a fresh network and held to the
student that they are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rapm.config import Config
from rapm.errors import UserError
from rapm.models.teacher import Teacher
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.quantize import quantize
from rapm.sampling import seeded

# How far a prediction may be off: shares of what the LoRA changes, and of the prediction. What
# rounds to 16 bits does so along another way in diffusers.
EXACT, ROUNDED = (1e-3, 1e-5), (0.05, 0.02)


class Readback:
    """A student's prediction, and the teacher's, on random inputs; files are held to it.

    Args:
        backbone: with the student's adapter.
    """

    def __init__(self, teacher: Teacher, config: Config, backbone: Backbone) -> None:
        self.teacher, self.config = teacher, config
        draws, size = seeded("read back"), config.trajectories.sizes()[0]
        shapes = teacher.family.conditioning(teacher.config)
        conditioning = {n: torch.randn(1, *own, generator=draws) for n, own in shapes.items()}
        conditioning |= teacher.of_picture(size, config.trajectories.guidance_scale)
        z = torch.randn(1, *teacher.latent_shape(size), generator=draws)
        self.inputs = z, torch.tensor([749]), conditioning
        self.student, self.without = (self._predict(backbone, a) for a in (STUDENT, TEACHER))

    @torch.no_grad()
    def _predict(self, backbone: Backbone, adapter: str) -> Tensor:
        with backbone.adapter(adapter):
            return backbone(*self.inputs).cpu()

    def check(self, file: Path, *, rounded: bool = False) -> None:
        """Holds a LoRA file to the student.

        Args:
            rounded: it was written in fewer bits.

        Raises:
            UserError: another program would draw something else with it.
        """
        pipeline = self.teacher.load_bare(self.config.torch_dtype, self._device)
        pipeline.load_lora_weights(str(file))
        self._hold(getattr(pipeline, self.teacher.family.network), file, rounded)

    def check_folder(self, folder: Path) -> None:
        """Holds a pipeline's folder that the student was fused into. Raises as :meth:`check`."""
        own = {"source": str(folder), "folder": folder, "checkpoint": None, "loras": ()}
        fused = replace(self.teacher, random=False, **own)
        self._hold(fused.load_network(self.config.torch_dtype, self._device), folder, rounded=True)

    @property
    def _device(self) -> str:
        """Where a network is loaded to; one that is held in fewer bits is never whole on a GPU."""
        return self.config.torch_device if self.config.base_precision == "same" else "cpu"

    def _hold(self, network: Any, file: Path, rounded: bool) -> None:
        config = self.config
        if config.base_precision != "same":
            quantize(network, config.base_precision, config.torch_device)
        found = self._predict(self.teacher.backbone(network), TEACHER)
        of_change, of_whole = ROUNDED if rounded or config.precision != "float32" else EXACT
        change, whole = (self.student - self.without).norm(), self.student.norm()
        error = (found - self.student).norm()
        if not error <= of_change * change + of_whole * whole:
            raise UserError(
                f"{file.name} was not written: diffusers read it back as another student, "
                f"{error / whole:.2g} of a prediction away, where the LoRA changes "
                f"{change / whole:.2g}; please report this"
            )

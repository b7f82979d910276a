"""A part of a teacher's folder: its class, config and files, looked at before they are loaded.

diffusers and transformers open whatever a folder or its index names. So everything is looked at
here first: files are regular ones, weights are safetensors inside the part's folder, and their
tensors are those that the config asks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as TEXT_INDEX_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as TEXT_WEIGHTS_NAME

from rapm.errors import UserError
from rapm.models import Family
from rapm.models.files import TEXT_BYTES, header_of, read_json, reading


@dataclass(frozen=True)
class Part:
    """A part of a teacher's folder in diffusers' layout.

    Attributes:
        source: the teacher as the user named it, for messages.
        folder: the teacher's.
        name: the part's: "unet", "text_encoder", ...
    """

    source: str
    folder: Path
    name: str

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def has_weights(self) -> bool:
        return not self.name.startswith(("tokenizer", "scheduler"))

    def kind(self) -> Any:
        """Its class, of diffusers or transformers and no other library.

        Raises:
            UserError: model_index.json names none.
        """
        with reading(self.source, "model_index.json"):
            entry = read_json(self.folder / "model_index.json").get(self.name)
        libraries = {"diffusers": diffusers, "transformers": transformers}
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        kind = getattr(libraries.get(str(library)), str(name), None)
        if not isinstance(kind, type):
            raise UserError(
                f"teacher '{self.source}': its {self.name} is {entry!r} by model_index.json, a "
                "class that neither diffusers nor transformers has"
            )
        return kind

    def config(self) -> Mapping[str, Any]:
        """
        Raises:
            UserError: it is missing or damaged.
        """
        kind = self.name.partition("_")[0]
        names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        name = names.get(kind, "config.json")
        try:
            config = read_json(self.path / name)
        except ValueError:
            raise UserError(f"teacher '{self.source}' has no readable {self.name}/{name}") from None
        if not self.name.startswith("text_encoder"):
            return config
        with reading(self.source, self.name):  # a part of it, or left out, where it is the default
            return self.kind().config_class.from_pretrained(self.path).to_dict()

    def weights(self) -> tuple[str | None, list[Path]]:
        """The variant that is loaded, and its files: the plain ones; of variant fp16 or of another
        one where there are no others.

        Raises:
            UserError: its index is damaged, or names what is no safetensors file beside it.
        """
        if self._is_diffusers:
            whole, index = SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
            order = index, whole  # as diffusers has it; transformers looks the other way round
        else:
            order = whole, index = TEXT_WEIGHTS_NAME, TEXT_INDEX_NAME
        stem = re.escape(whole.removesuffix(".safetensors"))
        named = re.compile(
            rf"{stem}(?:\.(\w+))?\.safetensors|{stem}\.safetensors\.index(?:\.(\w+))?\.json"
        )
        found = [named.fullmatch(file.name) for file in self.path.iterdir() if file.is_file()]
        variants = {match[1] or match[2] for match in found if match}
        if not variants:
            return None, []
        variant = min(variants, key=lambda v: (v is not None, v != "fp16", v or ""))
        file = next(each for n in order if (each := self.path / _add_variant(n, variant)).is_file())
        if file.suffix == ".safetensors":
            return variant, [file]
        with reading(self.source, self.name):
            names = {str(name) for name in read_json(file)["weight_map"].values()}
        for name in sorted(names):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(
                    f"teacher '{self.source}': the index of its {self.name} names '{name}'; only "
                    ".safetensors files beside it are read"
                )
        return variant, [self.path / name for name in sorted(names)]

    @property
    def _is_diffusers(self) -> bool:
        return issubclass(self.kind(), diffusers.ModelMixin)

    # ---- loading

    def load(self, precision: torch.dtype) -> Any:
        """
        Raises:
            UserError: it cannot be loaded whole.
        """
        kind = self.kind()
        with reading(self.source, self.name):
            if self.name.startswith("tokenizer"):
                return kind.from_pretrained(self.path, local_files_only=True)
            given = {"variant": self.weights()[0], "use_safetensors": True}
            given["torch_dtype" if self._is_diffusers else "dtype"] = precision
            model, told = kind.from_pretrained(
                self.path, output_loading_info=True, local_files_only=True, **given
            )
            if missing := sorted(told["missing_keys"]):
                raise ValueError(f"its files have no tensor '{missing[0]}'")
            return model

    def draw(self, precision: torch.dtype, device: str) -> Any:
        """With random weights, always the same; on the meta device without any."""
        kind, config = self.kind(), self.config()
        before = torch.get_default_dtype()
        torch.set_default_dtype(precision)
        try:
            with reading(self.source, self.name), torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                own = self._is_diffusers
                model = kind.from_config(config) if own else kind(kind.config_class(**config))
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    # ---- checks

    def check(self, *, weights: bool) -> None:
        """Whether everything that will be loaded in the end is there: nobody wants to hear of it
        after the rollout.

        Args:
            weights: they are read from here, and not from a single file.

        Raises:
            UserError: it is not.
        """
        incomplete = f"teacher '{self.source}' is incomplete: "
        if not self.path.is_dir():
            raise UserError(f"{incomplete}it has no {self.name}")
        if self.name != "scheduler":  # which is DDIM's whatever its class
            self.kind()
        for file in self.path.rglob("*"):
            if file.exists() and not file.is_file() and not file.is_dir():
                raise UserError(f"teacher '{self.source}': {file} is no regular file")
            text = file.suffix in (".json", ".txt", ".model") and file.is_file()
            if text and file.stat().st_size > TEXT_BYTES:
                raise UserError(
                    f"teacher '{self.source}': {file} is larger than {TEXT_BYTES >> 20} MiB"
                )
        if self.name.startswith("tokenizer"):
            if not any((self.path / n).is_file() for n in ("vocab.json", "tokenizer.json")):
                raise UserError(f"{incomplete}its {self.name} has no vocabulary")
        elif self.has_weights and weights:
            _, files = self.weights()
            if not files:
                pickled = any(self.path.glob("*.bin"))
                hint = (
                    ", only pickled ones, which are not read; save it anew with "
                    "safe_serialization=True"
                    if pickled
                    else ""
                )
                raise UserError(f"{incomplete}its {self.name} has no .safetensors weights{hint}")

    def check_weights(self) -> None:
        """Holds the headers of its files against what its config asks for.

        Raises:
            UserError: a file is damaged, or a tensor is missing, finds no place or does not fit.
        """
        files, model = self.weights()[1], self.layout()
        with_old_names = {name: x for file in files for name, x in header_of(file).items()}
        if self._is_diffusers:
            model._fix_state_dict_keys_on_load(with_old_names)
        placed = {k.removeprefix("text_model."): x for k, x in with_old_names.items()}
        tied: Any = getattr(model, "_tied_weights_keys", None)
        for one, other in tied.items() if isinstance(tied, dict) else ():  # of which a file has one
            for there, lacking in ((one, other), (other, one)):
                if there in placed:
                    placed.setdefault(lacking, placed[there])
        self.check_tensors(placed, lambda name: name)
        expected = self.expected()
        known = {*expected, *(k.removeprefix("text_model.") for k, _ in model.named_buffers())}
        layers = {k.split(".")[0] for k in expected}
        if strange := [k for k in placed if k not in known and k.split(".")[0] in layers]:
            raise self.out_of_place(strange)

    def layout(self) -> Any:
        """The model without weights. Built once for a config, as it is looked at many times."""
        changed = [self.path / "config.json", self.folder / "model_index.json"]
        return _layout(self, *(file.stat().st_mtime_ns for file in changed if file.is_file()))

    def expected(self) -> dict[str, Tensor]:
        """The model's tensors, without contents; a text encoder's as transformers 5 names them."""
        own = self.layout().state_dict()
        return {name.removeprefix("text_model."): tensor for name, tensor in own.items()}

    def check_tensors(
        self, placed: Mapping[str, Tensor], original: Callable[[str], str] = str
    ) -> None:
        """Holds tensors, by their place in the model, against what the config asks for.

        Raises:
            UserError: one is missing, has another shape or is packed.
        """
        refused = f"teacher '{self.source}' cannot be loaded: its {self.name}"
        expected = self.expected()
        missing = [k for k in expected if k not in placed]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise UserError(f"{refused} has no tensor '{missing[0]}'{more}")
        for name, tensor in expected.items():
            found = placed[name]
            if tensor.is_floating_point() and not found.is_floating_point():
                raise UserError(
                    f"{refused} holds '{original(name)}' quantised to integers; take the model in "
                    "float16, bfloat16 or float32"
                )
            if found.shape != tensor.shape:
                raise UserError(
                    f"{refused} has '{original(name)}' of shape {list(found.shape)} where its "
                    f"config asks for {list(tensor.shape)}"
                )

    def out_of_place(self, names: list[str]) -> UserError:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return UserError(
            f"teacher '{self.source}' cannot be loaded: its {self.name} holds '{names[0]}'{more}, "
            "which no layer takes (a quantised model's scales, or another architecture); take the "
            "model in float16, bfloat16 or float32"
        )


@cache
def _layout(part: Part, *changed: int) -> Any:
    return part.draw(torch.float32, "meta")


def parts_of(source: str, folder: Path, family: Family) -> list[Part]:
    """All that a family's teacher has."""
    names = (family.network, "vae", *family.text_parts, "scheduler")
    return [Part(source, folder, name) for name in names]

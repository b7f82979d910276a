"""The shipped presets: their names, what each is for, and whether one suits a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rapm.errors import UserError

if TYPE_CHECKING:
    from rapm.models import Family
    from rapm.models.teacher import Teacher

CONFIGS = Path(__file__).parent / "configs"


def presets() -> list[str]:
    """Names of the shipped presets."""
    return sorted(
        file.stem for file in (CONFIGS / "presets").glob("*.toml") if "." not in file.stem
    )


def described(name: str) -> str:
    """What a preset is for, as the head of its file says."""
    text = (CONFIGS / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    return text.split("\n")[0].removeprefix("# ").split(". ")[0].rstrip(".,")


def check_preset(name: str, teacher: Teacher) -> None:
    """
    Raises:
        UserError: the preset is for another family of models than the teacher's.
    """
    from rapm import settings
    from rapm.models.resolve import architecture_of

    def family(preset: str) -> Family:
        return architecture_of(settings.load(preset=preset)).family

    if family(name) is not teacher.family:
        fit = ", ".join(p for p in presets() if family(p) is teacher.family)
        raise UserError(
            f"preset '{name}' is for a {family(name).pipeline.__name__}, teacher "
            f"'{teacher.source}' is a {teacher.family.pipeline.__name__}; presets for it: {fit}"
        )

"""The configuration of a run: typed, validated, one TOML file. The only file that knows TOML."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rapm.errors import UserError
from rapm.prompts import is_hub
from rapm.schedule import Grid

PRESETS = Path(__file__).parent / "configs"

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kind = Literal["relative", "absolute"]  # of position, and of everything that is compared with it
Fraction = Annotated[float, Field(ge=0, le=1)]
_SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


class Section(BaseModel):
    """A table of the file. Unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Trajectories(Section):
    """What is precomputed: the teacher's sampling trajectories."""

    prompts: str = ""
    """A .txt, .csv, .tsv, .jsonl or .parquet file, or ``hub:OWNER/NAME``. Empty: the toy teacher's
    own captions."""
    count: Positive = 1000
    """Number of trajectories; prompts are taken in order, over again when there are fewer."""
    slots: Annotated[int, Field(ge=1, le=16)] = 4
    """N, the student's number of steps."""
    fine_steps: Positive = 2
    """M, fine steps in a slot: the teacher's, or where positions are relayed the last M - delta of
    them."""
    delta: Positive = 1
    """Fine steps from a coarse position down to the nudged one."""
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 7.5
    """The teacher's, baked into the student; 1 is none."""
    negative_prompt: str = ""
    """What the teacher is guided away from."""
    size: str = ""
    """Pixels, WIDTHxHEIGHT; several, separated by commas, are taken in turn. Empty: the teacher's
    own."""
    seed: int = 0
    """Trajectory k starts from the noise of (seed, k), unless its prompt has a seed of its own."""
    batch_size: Positive = 8
    """Trajectories rolled out, and a sheet's pictures sampled, side by side; costs memory, changes
    nothing."""
    shard_size: Positive = 32
    """Trajectories in a file; what a kill can cost."""

    def sizes(self) -> list[tuple[int, int] | None]:
        """(width, height) of each size; None for the teacher's own."""
        return [(int(w), int(h)) for w, h in _SIZE.findall(self.size)] or [None]

    @field_validator("size")
    @classmethod
    def _is_sizes(cls, text: str) -> str:
        if text and not re.fullmatch(rf"{_SIZE.pattern}(, *{_SIZE.pattern})*", text):
            raise ValueError(
                "write WIDTHxHEIGHT in pixels, several with commas between: 1024x1024,896x1152"
            )
        return text


class Student(Section):
    """The student's LoRA and how it learns."""

    rank: Positive = 16
    """LoRA rank; alpha is the rank (scale 1)."""
    targets: list[str] = []
    """Names of the modules that get LoRA; empty: all attention, feed-forward and convolution
    layers."""
    learning_rate: Rate = 1e-4
    """AdamW; see also ``training.warmup`` and ``training.decay``."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the average over the student's weights that is sampled and exported; 0 is none."""


class Critics(Section):
    """The two discriminators' LoRA and heads, and how they learn."""

    adversarial_weight: Weight = 0.0
    """Length of the adversarial gradient at the student's position over that of the distance's, in
    every slot and of each kind.
    0 leaves the critics out: beside relayed positions they earn nothing in either small world.
        Beside stored or
    followed ones 0.4 can help; see docs/results.md."""
    loss: Literal["relativistic", "hinge"] = "relativistic"
    """Which of the two is the teacher's (relativistic), or whether each one is (hinge, as PCM has
    it)."""
    noise: Literal["shared", "independent"] = "shared"
    """Real and fake are shown under the same noise, or each under its own (PCM)."""
    noise_power: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """k in tau = t_n + (t_{n+1} - t_n) u^k, the timestep whose noise they are shown under (u
    uniform in [0, 1)). 1 is PCM's uniform choice; more shows positions closer to as they are, fine
    detail with them."""
    rank: Annotated[int, Field(ge=1)] = 8
    """LoRA rank of each critic."""
    targets: list[str] = []
    """As for the student."""
    head_width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Channels of each head."""
    learning_rate: Rate = 1e-4
    """AdamW, betas 0 and 0.999."""
    start: Fraction = 0.0
    """Share of the iterations that pass on distances alone before the critics come in. From then on
    they learn in every iteration, from the way that the student went in it."""
    head_start: Fraction = 0.02
    """Share of the iterations that are then the critics' alone, before the student hears of
    them."""


class Training(Section):
    """The loop."""

    iterations: Positive = 4_000
    """Updates: the student's, with the critics' beside it once they have come in."""
    batch_size: Positive = 1
    """Trajectories in an iteration."""
    slot_batch: Positive = 1
    """Slots handled in one pass: 1 needs least memory, N is fastest where the GPU (or CPU) is not
    full."""
    walk_ahead: Positive = 1
    """Iterations whose trajectories the student walks, and the teacher follows, side by side before
    the first of them: faster where one alone does not fill the GPU (or CPU). Checkpoints lie
        between such blocks, and the student of a block's last
    iteration is that many updates less one ahead of the positions it learns from."""
    positions: Literal["stored", "followed", "relayed"] = "relayed"
    """Where relative and absolute positions come from. stored: from the stored trajectories, as in
    the paper. followed: from where the student itself stands; the teacher walks on from there in M
        guided steps, which costs time and no memory, and
    beforehand only the first slot is rolled out. relayed, for the absolute term alone: the
        student's own step leads down to the
    nudged position, there the teacher takes over, and nothing is rolled out beforehand. Stored ones
    are learnt by coming back to each trajectory ten times or so (iterations x batch_size / count),
    the others by having many; see docs/results.md."""
    relative_weight: Weight | list[Weight] = 0.0
    """Of the relative loss; a number, or one for each slot n = 0 ... N - 1. The paper's is 1, see
    docs/results.md."""
    absolute_weight: Weight | list[Weight] = 1.0
    """w_n, of the absolute loss; a number, or one for each slot n = 0 ... N - 1."""
    distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    """d."""
    huber_c: Rate = 1e-3
    """c of the pseudo-Huber distance."""
    warmup: Annotated[int, Field(ge=0)] = 20
    """Iterations over which all learning rates rise from zero."""
    decay: Fraction = 0.5
    """Share of the iterations, at the end, over which all learning rates fall linearly to zero."""
    gradient_clip: Rate = 1.0
    """Largest norm of a role's gradient."""
    weight_decay: Weight = 1e-3
    """AdamW, all roles."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit holds AdamW's state in 8 bits (arXiv 2110.02861); takes bitsandbytes."""
    gradient_checkpointing: bool = True
    """Trade a second forward for memory; the same gradients."""
    channels_last: bool = False
    """Convolutions' memory layout; results within rounding. No faster on the CPU it was measured
    on, on a GPU not measured."""
    compile: bool = False
    """torch.compile of the network's repeated blocks, while training: results within rounding,
    which is checked before the first iteration. Minutes at the start; what it gains on a GPU is not
    known yet, see docs/cost.md."""
    seed: int = 0
    """Of everything drawn in training and of the adapters' first weights."""
    checkpoint_every: Positive = 500
    """Iterations between checkpoints; one is written every 15 minutes besides, and after the last
    iteration."""
    keep_checkpoints: Positive = 2
    """How many are kept."""


class Config(Section):
    """A whole run."""

    teacher: str = "toy"
    """``toy``; a folder in diffusers' layout; a .safetensors checkpoint; a hub id, ``owner/name``
    or ``owner/name@revision``; ``random:sd15`` or ``random:sdxl``."""
    teacher_config: str = ""
    """For a single .safetensors checkpoint: folder in diffusers' layout with the configs and
    tokenizers that go with it."""
    teacher_loras: list[str] = []
    """LoRA files to fuse into the teacher, ``FILE`` or ``FILE:STRENGTH``, in diffusers' or kohya's
    form."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the frozen network computes in; adapters, losses and positions are float32 always.
    float16 is for GPUs without bfloat16 (RTX 20 and older)."""
    base_precision: Literal["same", "int8", "fp8", "nf4"] = "same"
    """What the frozen network's large weights are held in, to be brought back where they are used:
    less memory, more time. int8 and fp8 are half of bfloat16, int8 the nearer to it; nf4, a
    quarter, takes bitsandbytes. same: as ``precision``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; auto takes a GPU when there is one."""
    trajectories: Trajectories = Trajectories()
    student: Student = Student()
    critics: Critics = Critics()
    training: Training = Training()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        try:
            self.grid()
        except ValueError as error:
            raise ValueError(
                f"trajectories.slots, .fine_steps and .delta do not fit together: {error}"
            ) from None
        if (
            self.training.positions == "relayed"
            and self.trajectories.delta == self.trajectories.fine_steps
        ):
            raise ValueError(
                "trajectories.delta must be less than fine_steps where training.positions = "
                "'relayed': "
                "no step would be left to the teacher"
            )
        for name in ("relative_weight", "absolute_weight"):
            weights = getattr(self.training, name)
            if isinstance(weights, list) and len(weights) != self.trajectories.slots:
                raise ValueError(
                    f"training.{name} has {len(weights)} weights for N = {self.trajectories.slots} "
                    f"slots"
                )
        if self.training.positions == "relayed" and any(self.slot_weights("relative")):
            raise ValueError(
                "training.relative_weight must be 0 where training.positions = 'relayed': there "
                "the relative position is the "
                "student's own word on its own way, and training collapses; take positions "
                "'stored' or 'followed' with it"
            )
        if self.critics.adversarial_weight and self.critics.start + self.critics.head_start >= 1:
            raise ValueError(
                "critics.start and critics.head_start add up to 1 or more: the student would never "
                "hear of the critics"
            )
        if (
            self.training.batch_size * self.training.walk_ahead > 1
            and len(self.trajectories.sizes()) > 1
        ):
            raise ValueError(
                "trajectories.size names several sizes; pictures of different size fit in no "
                "batch: training.batch_size = 1 "
                "and training.walk_ahead = 1"
            )
        if not any(self.slot_weights("relative") + self.slot_weights("absolute")):
            raise ValueError(
                "training.relative_weight and training.absolute_weight are both 0: nothing to learn"
            )
        return self

    def grid(self) -> Grid:
        return Grid(self.trajectories.slots, self.trajectories.fine_steps, self.trajectories.delta)

    def slot_weights(self, kind: Kind) -> list[float]:
        """The weight of each slot n = 0 ... N - 1."""
        weights = getattr(self.training, f"{kind}_weight")
        return weights if isinstance(weights, list) else [weights] * self.trajectories.slots

    @property
    def rolled_slots(self) -> int:
        """Slots that the teacher is rolled out over beforehand: all, or where positions are
        followed the first, in which the student starts from the noise as the teacher does. In the
        others the teacher walks on from where the student stands, and where positions are relayed
        in the first as well."""
        return {"stored": self.trajectories.slots, "followed": 1, "relayed": 0}[
            self.training.positions
        ]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    @property
    def torch_device(self) -> str:
        """Where this run computes.

        Raises:
            UserError: ``cuda`` was asked for and there is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "device = 'cuda' but torch sees no GPU; use 'cpu' or 'auto', or install torch for "
                "your GPU"
            )
        return (
            ("cuda" if torch.cuda.is_available() else "cpu")
            if self.device == "auto"
            else self.device
        )


# These change how fast a run goes, what it costs or what it leaves behind, and what it computes by
# no more than rounding.
_FREE_ON_RESUME = {
    ("device",),
    ("trajectories", "batch_size"),
    ("training", "checkpoint_every"),
    ("training", "keep_checkpoints"),
    ("training", "slot_batch"),
    ("training", "gradient_checkpointing"),
    ("training", "channels_last"),
    ("training", "compile"),
}


# Where things lie. What they are is held against the fingerprints that trajectories carry, so files
# may move.
_PLACES = {("teacher",), ("teacher_config",), ("teacher_loras",), ("trajectories", "prompts")}


def flatten(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in table.items():
        flat |= (
            flatten(value, (*prefix, key))
            if isinstance(value, Mapping)
            else {(*prefix, key): value}
        )
    return flat


def differences(old: Config, new: Config, *, may_have_moved: bool = False) -> list[str]:
    """The keys in which two configurations would compute different results, with both values;
    without those that say where teacher and prompts lie, if these may have moved."""
    a, b = flatten(old.model_dump()), flatten(new.model_dump())
    free = _FREE_ON_RESUME | (_PLACES if may_have_moved else set())
    return [f"{'.'.join(k)}: {a[k]!r} -> {b[k]!r}" for k in a if a[k] != b[k] and k not in free]


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        kind: Any = info.annotation
        nested = isinstance(kind, type) and issubclass(kind, Section)
        keys += _known_keys(kind, f"{prefix}{name}.") if nested else [prefix + name]
    return keys


def parse(table: Mapping[str, Any], origin: str) -> Config:
    """Validates a table.

    Raises:
        UserError: unknown key (with the nearest known one), wrong type or value; ``origin`` says
            whose table it was.
    """
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
        if unknown:
            table = unknown["input"] if isinstance(unknown["input"], Mapping) else {}
            key = ".".join(str(part) for part in (*unknown["loc"], *next(iter(flatten(table)), ())))
            near = difflib.get_close_matches(key, _known_keys(Config), 1, 0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{origin}: unknown key '{key}'{hint}") from None
        first = max(
            errors, key=lambda e: len(e["loc"])
        )  # of a union's branches, the one that got furthest, without its name
        key = ".".join(str(part) for part in first["loc"] if not {*"-["} & {*str(part)})
        message = first["msg"].removeprefix("Value error, ")
        given = f" (given: {first['input']!r})" if key else ""
        raise UserError(f"{origin}: {key + ': ' if key else ''}{message}{given}") from None


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _absolute(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Makes what it names of files and folders absolute, as a run may go on from another place;
    ``~`` is the home folder."""

    def found(name: object, *, must: bool) -> Any:
        if not isinstance(name, str) or not name or is_hub(name):
            return name
        path = os.path.abspath(folder / os.path.expanduser(name))
        return (
            path if must or (name != "toy" and os.path.exists(path)) else name
        )  # else it may be a hub id

    table = dict(table)
    for key, must in (("teacher", False), ("teacher_config", True)):
        if key in table:
            table[key] = found(table[key], must=must)
    if isinstance(table.get("teacher_loras"), list):
        table["teacher_loras"] = [
            found(name, must=True) for name in table["teacher_loras"]
        ]  # with the strength at its end
    trajectories = table.get("trajectories")
    if isinstance(trajectories, Mapping) and "prompts" in trajectories:
        table["trajectories"] = {
            **trajectories,
            "prompts": found(trajectories["prompts"], must=True),
        }
    return table


def parse_text(text: str, origin: str) -> Config:
    """Validates what :func:`dump` wrote; raises as :func:`parse` does."""
    return parse(tomllib.loads(text), origin)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no config file {file}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not a TOML file: {error}") from None


def _setting(text: str) -> dict[str, Any]:
    """``training.iterations=100`` as a nested table; a value that is no TOML is taken as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {text!r}: write KEY=VALUE, for instance training.iterations=100")
    parsed: Any
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def presets() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def load(
    file: Path | None = None,
    *,
    preset: str | None = None,
    teacher: str | None = None,
    teacher_config: Path | None = None,
    teacher_loras: Sequence[str] = (),
    prompts: str | Path | None = None,
    size: str | None = None,
    settings: Sequence[str] = (),
) -> Config:
    """Puts a configuration together: defaults, then the preset, then the file, then single
    settings.

    Args:
        file: TOML file.
        preset: name of a shipped one; the toy teacher takes ``toy`` by itself.
        teacher: overrides the teacher; a folder or file is kept as an absolute path, as a run may
            go on from another place.
        teacher_config, teacher_loras, prompts, size: override those settings; files and folders are
            kept absolute too.
        settings: ``section.key=value`` each.

    Raises:
        UserError: anything in them is wrong.
    """
    table: dict[str, Any] = {}
    given = [_absolute(_read(file), file.parent)] if file else []
    options: dict[str, Any] = {}
    for name, value in (("teacher", teacher), ("prompts", prompts)):
        if value is not None and not str(value).strip():
            raise UserError(f"--{name} is empty")
    if teacher:
        options["teacher"] = teacher
    if teacher_config:
        options["teacher_config"] = str(teacher_config)
    if teacher_loras:
        options["teacher_loras"] = list(teacher_loras)
    if prompts:
        options["trajectories"] = {"prompts": str(prompts)}
    given += [_absolute(part, Path()) for part in (*(_setting(text) for text in settings), options)]
    if size:
        given.append({"trajectories": {"size": size}})
    source = next((t["teacher"] for t in reversed(given) if "teacher" in t), "toy")
    if preset is None and source == "toy":
        preset = "toy"
    if preset is not None:
        if preset not in presets():
            raise UserError(f"there is no preset '{preset}'; there are: {', '.join(presets())}")
        table = _read(PRESETS / f"{preset}.toml")
    for part in given:
        table = _merge(table, part)
    return parse(
        table,
        " and ".join(
            [*([str(file)] if file else []), *(["settings"] if settings or not file else [])]
        ),
    )


def dump(config: Config) -> str:
    """The configuration as TOML, every key written out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def read(file: Path) -> Config:
    """A configuration that :func:`dump` wrote.

    Raises:
        UserError: the file is damaged or of another version.
    """
    return parse(_read(file), str(file))

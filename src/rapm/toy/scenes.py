"""The renderer of the toy data set: 64 x 64 scenes of one to three objects on a textured ground.

A caption names what is there (count, colours, shapes, ground) and leaves positions, sizes and
angles open. That freedom is what makes few-step sampling of a teacher hard: the mean of many
possible pictures is a ghost, and only many steps commit to one of them.

Scene ``index`` of ``seed`` is the same picture and caption for ever: every draw comes from one
    generator seeded by the pair.
Captions are split by a checksum into ``train``, ``validation`` and ``test``, so no network trained
on the first ever meets a caption of the others, whatever the seed.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]

SIZE = 64  # pixels
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.72, 0.22),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.97, 0.90, 0.12),
    "purple": (0.58, 0.14, 0.78),
    "cyan": (0.15, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
    "black": (0.07, 0.07, 0.08),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
GROUNDS = ("grass", "sand", "water", "brick")
KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)  # 48 kinds of object

_RADII = {
    1: (12.0, 19.0),
    2: (10.0, 15.0),
    3: (9.0, 12.0),
    4: (8.0, 10.0),
}  # pixels, by number of objects
_COUNT_WEIGHTS = (0.0, 0.5, 0.35, 0.15)
_SUPERSAMPLE_EDGE = 1.2  # pixels over which an edge goes from inside to outside


@dataclass(frozen=True)
class Thing:
    """One object. Position and radius in pixels, angle in radians."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def kind(self) -> int:
        """Index of (colour, shape) in ``KINDS``."""
        return KINDS.index((self.colour, self.shape))


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and the caption that says so. ``texture`` holds four free numbers in
    [0, 1) of the ground."""

    ground: str
    things: tuple[Thing, ...]
    texture: tuple[float, float, float, float]
    caption: str


# ---- captions


def _phrase(thing: Thing, rng: np.random.Generator) -> str:
    return (
        f"a {thing.colour} {thing.shape}",
        f"one {thing.colour} {thing.shape}",
        f"a {thing.shape} in {thing.colour}",
    )[rng.choice(3, p=(0.6, 0.2, 0.2))]


def _caption(ground: str, things: Sequence[Thing], rng: np.random.Generator) -> str:
    phrases = [_phrase(thing, rng) for thing in things] or ["nothing"]
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return (
        f"{listed} on {ground}",
        f"a picture of {listed} on {ground}",
        f"on {ground}, {listed}",
        f"{listed}, {ground} in the background",
    )[rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))]


def split_of(caption: str) -> Split:
    """The split a caption belongs to, whoever drew it: 80 % train, 10 % validation, 10 % test."""
    bucket = zlib.crc32(caption.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def parse_caption(caption: str) -> tuple[str, list[int]]:
    """What a caption of this world asks for.

    Returns:
        The ground and the sorted indices into ``KINDS``.

    Raises:
        ValueError: the text is not a caption of this world.
    """
    words = caption.replace(",", " ").split()
    ground = next((word for word in words if word in GROUNDS), None)
    kinds = []
    for i, word in enumerate(words):
        if word in SHAPES:
            colour = words[i + 2] if words[i + 1 : i + 2] == ["in"] else words[i - 1]
            if colour not in COLOURS:
                raise ValueError(f"no colour for '{word}' in caption {caption!r}")
            kinds.append(KINDS.index((colour, word)))
    if ground is None or not kinds:
        raise ValueError(
            f"not a caption of the toy world: {caption!r} (write, for instance, 'a red star on "
            f"grass')"
        )
    return ground, sorted(kinds)


# ---- scenes


def _place(rng: np.random.Generator, count: int, *, distinct: bool) -> tuple[Thing, ...]:
    """Draws ``count`` objects that do not overlap."""
    kinds = rng.choice(len(KINDS), size=count, replace=not distinct)
    while True:
        things: list[Thing] = []
        for kind in kinds:
            radius = rng.uniform(*_RADII[count])
            for _ in range(30):
                x, y = rng.uniform(radius + 1, SIZE - radius - 1, size=2)
                if all(
                    math.hypot(x - o.x, y - o.y) > 0.94 * (radius + o.radius) + 1 for o in things
                ):
                    colour, shape = KINDS[kind]
                    things.append(Thing(colour, shape, x, y, radius, rng.uniform(0, 2 * math.pi)))
                    break
        if len(things) == count:
            return tuple(things)


def draw_scene(
    rng: np.random.Generator,
    *,
    count_weights: Sequence[float] = _COUNT_WEIGHTS,
    distinct: bool = True,
) -> Scene:
    """Draws one scene.

    Args:
        rng: where every draw comes from.
        count_weights: probability of 0, 1, 2, ... objects (at most 4).
        distinct: no two objects of one colour and shape, as in every captioned scene.
    """
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    things = _place(rng, int(rng.choice(len(count_weights), p=count_weights)), distinct=distinct)
    u = rng.random(4)
    return Scene(ground, things, (u[0], u[1], u[2], u[3]), _caption(ground, things, rng))


def scene(seed: int, index: int, split: Split = "train") -> Scene:
    """Scene ``index`` of ``seed`` among the captions of ``split``: always the same one."""
    rng = np.random.default_rng((seed, index))
    while True:
        drawn = draw_scene(rng)
        if split_of(drawn.caption) == split:
            return drawn


def captions(count: int, seed: int, split: Split = "train") -> list[str]:
    """The first ``count`` captions of ``seed`` in ``split``; captions may repeat, as in any set of
    prompts."""
    return [scene(seed, index, split).caption for index in range(count)]


# ---- rendering

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _ground(name: str, u: Sequence[float]) -> np.ndarray:
    """The texture of a ground, [64, 64, 3] in [0, 1]; phases, wavelengths and tilt vary with
    ``u``."""
    tau = 2 * math.pi
    px, py = u[0] * tau, u[1] * tau
    if name == "grass":  # blades: narrow upright waves that sway
        sway = 1.5 * np.sin(tau * _Y / 24 + py)
        wave = np.sin(tau * (_X + sway) / (5 + u[2]) + px) * (
            0.6 + 0.4 * np.sin(tau * _Y / 13 + px)
        )
        colour, depth = (0.30, 0.47, 0.17), (0.09, 0.12, 0.06)
    elif name == "sand":  # ripples, tilted
        tilt = (u[3] - 0.5) * 0.9
        along = _Y * math.cos(tilt) + _X * math.sin(tilt)
        wave = np.sin(tau * along / (7 + 2 * u[2]) + px + 0.8 * np.sin(tau * _X / 30 + py))
        colour, depth = (0.80, 0.70, 0.50), (0.08, 0.08, 0.09)
    elif name == "water":  # two crossing swells
        a = np.sin(tau * (_Y + 2 * np.sin(tau * _X / 21 + px)) / (8 + 2 * u[2]) + py)
        b = np.sin(tau * (_X + _Y) / 17 + px)
        wave = 0.75 * a + 0.35 * b
        colour, depth = (0.20, 0.42, 0.60), (0.08, 0.10, 0.11)
    else:  # brick: courses of 8 pixels, bricks of 16, every other course shifted by half
        y = (_Y + 8 * u[1]) / 8
        x = (_X + 16 * u[0] + 8 * (np.floor(y) % 2)) / 16
        mortar = np.maximum(np.abs((y % 1) - 0.5) * 8 - 3.0, np.abs((x % 1) - 0.5) * 16 - 7.0).clip(
            0, 1
        )
        wave = (
            2.2 * mortar - 0.6 + 0.25 * np.sin(np.floor(x) * 2.4 + np.floor(y) * 1.7 + tau * u[2])
        )
        colour, depth = (0.55, 0.30, 0.24), (0.10, 0.11, 0.11)
    return np.asarray(colour, np.float32) + wave[..., None] * np.asarray(depth, np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline (negative inside) in a frame where the object has radius 1."""
    if shape == "circle":
        return np.hypot(x, y) - 0.92
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.26
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.78
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(a - 1.0, b - 0.33), np.maximum(a - 0.33, b - 1.0))
    if shape == "triangle":
        return (
            np.maximum.reduce(
                [x * math.cos(k) + y * math.sin(k) for k in (0.5, 0.5 + 2.0944, 0.5 + 4.1888)]
            )
            - 0.55
        )
    # star: fold the plane onto one half-point, then a half-plane through the tip and the inner
    # corner
    fold = np.abs((np.arctan2(y, x) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    r = np.hypot(x, y)
    tip, corner = (
        np.array([1.08, 0.0]),
        0.46 * np.array([math.cos(math.pi / 5), math.sin(math.pi / 5)]),
    )
    edge = (corner - tip) / np.linalg.norm(corner - tip)
    return (r * np.cos(fold) - tip[0]) * edge[1] - (r * np.sin(fold) - tip[1]) * edge[0]


def render(scene: Scene) -> np.ndarray:
    """Draws a scene.

    Returns:
        float32 [64, 64, 3] in [0, 1].
    """
    image = _ground(scene.ground, scene.texture)
    for thing in scene.things:
        x, y = (_X - thing.x) / thing.radius, (_Y - thing.y) / thing.radius
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)

        def cover(dx: float, soft: float, x=x, y=y, thing=thing, cos=cos, sin=sin) -> np.ndarray:
            u, v = x - dx / thing.radius, y - dx / thing.radius
            d = _distance(thing.shape, u * cos + v * sin, v * cos - u * sin) * thing.radius
            return (0.5 - d / soft).clip(0, 1)[..., None]

        image = image * (1 - 0.45 * cover(2.2, 3.0))  # the shadow falls to the lower right
        light = (0.92 - 0.22 * (x + y)).clip(0.6, 1.15)[
            ..., None
        ]  # shading: lit from the upper left
        lift = 0.12 * (light - 0.92).clip(0)
        colour = (np.asarray(COLOURS[thing.colour], np.float32) * light + lift).clip(0, 1)
        inside = cover(0.0, _SUPERSAMPLE_EDGE)
        image = image * (1 - inside) + colour * inside
    return image.clip(0, 1).astype(np.float32)


def render_many(scenes: Iterator[Scene] | Sequence[Scene]) -> np.ndarray:
    """Renders scenes to uint8 [n, 64, 64, 3]."""
    return np.stack([(render(s) * 255 + 0.5).astype(np.uint8) for s in scenes])

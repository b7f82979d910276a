"""Small distillations of the embedded teacher, in tables: what the paper claims, what the
neighbours do, what settings do.

    python benchmarks/textured.py --out .paper/textured        # another world for one of the tables
    python benchmarks/paper.py --out .paper                    # everything; stop it any time, the
    same command goes on python benchmarks/paper.py --out .paper --table ablation   # one table
    python benchmarks/paper.py --out .paper --costs            # times updates; the table "equal
    time" waits for it python benchmarks/paper_report.py .paper                   # docs/results.md
    and its figures

Runs go side by side, each on one thread (``--jobs``; a GPU holds many). Every run has batch size 1
and the same number of student updates unless its name says otherwise, and is scored on the 1,000
validation captions of the embedded world's protocol, beside what the teacher draws of them in 20
steps from other seeds. A finished run is a line in OUT/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from baselines import Method, Pictures, World, dmd2, lcm, pcm, regression
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import rapm.train as training
import rapm.turns as turns
from rapm import config as configuration
from rapm.config import Config
from rapm.counting import count
from rapm.errors import NonFinite
from rapm.evaluate import toy as toy_protocol as protocol
from rapm.evaluate.metrics import frechet_distance
from rapm.io import load_tensors, save_tensors, under_prefix, with_prefix
from rapm.models.resolve import teacher_of
from rapm.network import STUDENT, TEACHER, Backbone
from rapm.objective import Positions, from_nudged, positions, student_step
from rapm.estimate import Stub, bytes_of, duration, make_plan, teacher_pass, without_weights
from rapm.run import Run
from rapm.sample import Studio, open_studio, sheet
from rapm.schedule import trailing_timesteps
from rapm.pipeline import make_trajectories
from rapm.models.teacher import Teacher, load_backbone
from rapm.toy import ORACLE, scenes
from rapm.toy.oracle import Oracle
from rapm.train import rate_factor
from rapm.trajectories import Trajectory, TrajectoryStore, guided, picture_noise
from rapm.turns import Batch, Learner, Players, Walked

UPDATES = 600  # of the student, in every run whose name does not say otherwise
SHARED = [
    "training.positions=stored",
    "training.relative_weight=1",
    "training.absolute_weight=1",
    "training.walk_ahead=1",
    "trajectories.count=1000",
    "trajectories.fine_steps=10",
    "student.learning_rate=7e-4",
    "critics.adversarial_weight=0.4",
]
FOLLOWED = ["training.positions=followed", "trajectories.fine_steps=3"]
RELAYED = ["training.positions=relayed", "trajectories.fine_steps=2"]  # as in the demo
NO_CRITICS = ["critics.adversarial_weight=0"]
SEEDS = (0, 1, 2)
PICTURES = 2000  # rendered scenes for methods that take pictures
BOOTSTRAP = 20
METHODS: dict[str, type[Method]] = {
    "pcm": pcm.Pcm,
    "lcm": lcm.Lcm,
    "regression": regression.Regression,
    "dmd2": dmd2.Dmd2,
}
MOST_SLOTS = 8  # that trajectories are stored with, where fewer can be seen in them


@dataclass(frozen=True)
class Spec:
    """A run.

    Attributes:
        name: of the variant, the same for all its seeds.
        method: ``rapm``, one of its three altered forms (see :func:`train_rapm`), or a neighbour.
        settings: beyond the demo's preset and ``SHARED``, which holds what the demo once had.
        updates: of the student.
        first: trajectories taken of those stored; 0 is all.
        steps: the numbers of steps it is sampled with, if not N alone.
        curve: scored at each quarter, too.
        world: the folder, in OUT, of another world than the embedded one.
    """

    table: str
    name: str
    method: str = "rapm"
    settings: Sequence[str] = ()
    seed: int = 0
    updates: int = UPDATES
    first: int = 0
    steps: Sequence[int] = ()
    curve: bool = False
    world: str = ""

    @property
    def key(self) -> str:
        return f"{self.table}/{self.name}/{self.seed}"

    @property
    def uses_store(self) -> bool:
        """Whether it learns from trajectories rolled out before."""
        return self.method.startswith("rapm") or self.method == "regression"

    def config(self, out: Path) -> Config:
        """With so many iterations that the student gets its updates."""
        given = [*SHARED, *self.settings, f"training.seed={self.seed}"]
        if not self.uses_store:
            given.append("trajectories.count=1")  # for what a store says besides
        place = in_world(out / self.world)
        assert place or not self.world, f"{out / self.world} is not built"
        config = configuration.load(preset="toy", settings=[*place, *given])

        def with_iterations(number: int) -> Config:
            kept = {
                "iterations": number,
                "checkpoint_every": -(-number // 4),
                "keep_checkpoints": 4 if self.curve else 1,
            }
            return config.model_copy(update={"training": config.training.model_copy(update=kept)})

        number = self.updates
        while (lacking := self.updates - self.updates_in(with_iterations(number), number)) > 0:
            number += lacking
        return with_iterations(number)

    def updates_in(self, config: Config, iterations: int) -> int:
        """Updates of the student in the first so many iterations."""
        if self.method.startswith("rapm"):
            return sum(not turns.critics_alone(config, k) for k in range(iterations))
        return iterations // METHODS[self.method].turns


def in_world(home: Path) -> list[str]:
    """Settings that take the teacher and the captions of the world that was built in a folder; of
    the embedded one, if none."""
    if not (home / "captions.txt").is_file():
        return []
    return [
        f"teacher={home / 'assets' / 'teacher'}",
        f"trajectories.prompts={home / 'captions.txt'}",
    ]


def oracle_of(home: Path) -> Oracle:
    """The oracle of that world."""
    own = home / "assets" / "oracle.safetensors"
    return Oracle.load(own if own.is_file() else ORACLE)


def ablation() -> list[Spec]:
    """The paper's Figure 3, and where the student's targets start."""
    terms = {
        "relative + absolute": [],
        "relative only": ["training.absolute_weight=0"],
        "absolute only": ["training.relative_weight=0"],
    }
    specs = [
        Spec("ablation", f"{name}, distances alone", settings=[*own, *NO_CRITICS])
        for name, own in terms.items()
    ]
    specs += [
        Spec("ablation", f"{name}, with critics", settings=own) for name, own in terms.items()
    ]
    specs += [
        Spec("ablation", "second detach removed, distances alone", "rapm-undetached", NO_CRITICS),
        Spec(
            "ablation",
            "frozen student from its own position, distances alone",
            "rapm-own-start",
            NO_CRITICS,
        ),
        Spec(
            "ablation",
            "both followed from its own position (M = 3), distances alone",
            settings=[*FOLLOWED, *NO_CRITICS],
        ),
        Spec(
            "ablation",
            "absolute only, followed from its own position (M = 3), distances alone",
            settings=[*FOLLOWED, "training.relative_weight=0", *NO_CRITICS],
        ),
        Spec(
            "ablation",
            "absolute only, relayed (M = 2), distances alone",
            settings=[*RELAYED, *ABSOLUTE, *NO_CRITICS],
        ),
    ]
    return [replace(spec, seed=seed) for seed in SEEDS for spec in specs]


RATES = (2e-4, 7e-4, 2e-3)
FEW_FINE = ["trajectories.fine_steps=3"]  # a third of the rollout of M = 10
ABSOLUTE = ["training.relative_weight=0"]
AHEAD = ["training.walk_ahead=8"]  # as in the demo
OF_DEMO = ["student.learning_rate=1.5e-3", "trajectories.count=4000"]
# updates, where 1,297 have none: an update takes 1.37 times as long then (three short runs by
# turns)
EQUAL_WITH_CRITICS = 950
LAST_SLOT = ["training.absolute_weight=[4,1,1,1]"]  # as in the demo
NEIGHBOURS: dict[str, tuple[str, list[str]]] = {
    "RAPM, followed, absolute only": ("rapm", [*FOLLOWED, *ABSOLUTE]),
    "RAPM": ("rapm", FEW_FINE),
    "PCM": ("pcm", []),
    "LCM": ("lcm", []),
    "regression": ("regression", FEW_FINE),
    "distribution matching": ("dmd2", []),
    "RAPM, followed, absolute only, no critics": ("rapm", [*FOLLOWED, *ABSOLUTE, *NO_CRITICS]),
    "RAPM, followed, absolute only, no critics, 8 walk "
    "ahead": ("rapm", [*FOLLOWED, *ABSOLUTE, *NO_CRITICS, *AHEAD]),
    "RAPM, 64 trajectories, no "
    "critics": ("rapm", [*FEW_FINE, *NO_CRITICS, "trajectories.count=64"]),
    "RAPM, relayed, absolute only, no critics, 8 walk ahead": (
        "rapm", [*RELAYED, *ABSOLUTE, *NO_CRITICS, *AHEAD, "trajectories.count=2000"],
    ),
}  # fmt: skip


def neighbours(lines: Sequence[Mapping[str, Any]]) -> list[Spec]:
    """The paper's Figure 5: first the rates of each method; then, once they are known and what an
    update costs, the best one with all seeds, with as many updates as take the time of the first
    method's. A curve of one seed: scores take time."""

    def spec(name: str, rate: float, seed: int, **given: Any) -> Spec:
        method, own = NEIGHBOURS[name]
        critics = (
            rate if method == "dmd2" else 2 * rate
        )  # what it learns beside the student, as its authors have it
        settings = [*own, f"student.learning_rate={rate}", f"critics.learning_rate={critics}"]
        return Spec("neighbours", f"{name}, rate {rate:g}", method, settings, seed, **given)

    specs = [spec(name, rate, 0) for rate in RATES for name in NEIGHBOURS]
    known = {
        line["key"]: line["lines"][-1] if line["lines"] else {"fid": math.inf} for line in lines
    }  # that failed, if none
    taken = next((line["seconds"] for line in reversed(lines) if line["table"] == "costs"), {})
    for seed in SEEDS:
        for name in NEIGHBOURS:
            tried = [spec(name, rate, 0) for rate in RATES]
            if name in taken and all(each.key in known for each in tried):
                best = min(tried, key=lambda each: known[each.key]["fid"])
                updates = taken[name]["updates"]
                specs.append(
                    replace(best, table="equal time", seed=seed, updates=updates, curve=seed == 0)
                )
    return specs


def sweeps() -> list[Spec]:
    """Settings, one at a time, of what wins above: followed positions, the absolute term alone;
    without critics, unless it is they that are looked at. Where that itself belongs into a table,
    it is the one of "ablation", with critics of "library". Seeds are told apart there."""

    def spec(table: str, name: str, settings: Sequence[str], **given: Any) -> Spec:
        return Spec(table, name, settings=[*FOLLOWED, *ABSOLUTE, *NO_CRITICS, *settings], **given)

    def with_critics(table: str, name: str, settings: Sequence[str], **given: Any) -> Spec:
        return Spec(table, name, settings=[*FOLLOWED, *ABSOLUTE, *settings], **given)

    forms = {
        "noise of its own for each": ["critics.noise=independent"],
        "at any noise of the slot": ["critics.noise_power=1"],
        "hinge": ["critics.loss=hinge"],
        "hinge, noise of its own, at any noise (PCM)": [
            "critics.loss=hinge", "critics.noise=independent", "critics.noise_power=1",
        ],
        "from the beginning": ["critics.start=0"],
        "from three quarters on": ["critics.start=0.75"],
    }  # fmt: skip
    specs = [with_critics("critic", name, own) for name, own in forms.items()]
    both = "training.relative_weight=1"
    specs += [
        spec("weights", f"both terms, w_n = {w:g}", [both, f"training.absolute_weight={w}"])
        for w in (0.1, 0.5, 2)
    ]
    by_slot = {"w_0 = 4": "[4,1,1,1]", "w_3 = 4": "[1,1,1,4]"}
    specs += [
        spec("weights", name, [f"training.absolute_weight={w}"]) for name, w in by_slot.items()
    ]
    stored = "training.positions=stored"
    for delta in (2, 5):
        settings = [stored, both, "trajectories.fine_steps=10", f"trajectories.delta={delta}"]
        specs.append(
            spec("weights", f"both terms, stored positions of M = 10, delta {delta}", settings)
        )
    weights = (0.1, 0.8)  # 0.4 is the default
    specs += [
        with_critics(
            "weights", f"critics, adversarial weight {w:g}", [f"critics.adversarial_weight={w}"]
        )
        for w in weights
    ]
    specs += [spec("rank", f"student {r}", [f"student.rank={r}"]) for r in (1, 4, 64)]
    specs.append(with_critics("rank", "critics of rank 1", ["critics.rank=1"]))
    specs.append(with_critics("rank", "critics of heads only", [], method="rapm-heads-only"))
    for n, m in ((1, 12), (2, 6), (4, 3), (8, 2)):
        settings = [f"trajectories.slots={n}", f"trajectories.fine_steps={m}"]
        specs.append(
            spec(
                "steps",
                f"trained for {n} (M = {m})",
                settings,
                steps=(1, 2, 4, 8) if n == 4 else (n,),
            )
        )
    specs += [
        spec("trajectories", f"followed, {count} of M = 3", [], first=count)
        for count in (16, 64, 256)
    ]
    specs += [
        spec("trajectories", f"followed, 1000 of M = {m}", [f"trajectories.fine_steps={m}"])
        for m in (1, 5, 10)
    ]
    for fine in (5, 10, 25, 50):
        for number in (
            16,
            64,
            256,
            1000 if fine <= 10 else UPDATES,
        ):  # updates see no more of 1,000 than that
            settings = [stored, f"trajectories.fine_steps={fine}"]
            if fine > 10:  # where a rollout takes long
                settings.append(f"trajectories.count={max(number, 256)}")
            if (fine, number) != (10, 1000):  # that is one of "ablation"
                specs.append(
                    spec("trajectories", f"stored, {number} of M = {fine}", settings, first=number)
                )
    return specs


def visits() -> list[Spec]:
    """The ablation's stored positions again, with 64 of the trajectories: 600 updates come back to
    each nine times, where of 1,000 they do not see them all. The authors' 20,000 iterations come
    back to each of their 1,000 twenty times."""
    again = [
        spec
        for spec in ablation()
        if not spec.method.startswith("rapm-")
        and "followed" not in spec.name
        and "relayed" not in spec.name
    ]
    chosen = [spec for spec in again if spec.seed == 0 or "relative only" not in spec.name]
    return [replace(spec, table="visits", first=64) for spec in chosen]


def library() -> list[Spec]:
    """Critics that learn from the way that the student has just gone, beside followed positions,
    which were the default."""
    own = Spec("library", "as the library does it", settings=[*FOLLOWED, *ABSOLUTE])
    slower = replace(
        own,
        name="as the library does it, critics' rate 0.0007",
        settings=[*own.settings, "critics.learning_rate=7e-4"],
    )
    return [*(replace(own, seed=seed) for seed in SEEDS), slower]


def relay() -> list[Spec]:
    """Where on the student's own step the teacher takes over, and critics. (Results hold a run of
    both terms, too, which the library refuses since.)"""
    forms = {  # the ablation has M = 2, delta 1, the absolute term alone
        "M = 3, delta 2": [*NO_CRITICS, "trajectories.fine_steps=3", "trajectories.delta=2"],
        "M = 4, delta 3": [*NO_CRITICS, "trajectories.fine_steps=4", "trajectories.delta=3"],
        "M = 3, delta 1": [*NO_CRITICS, "trajectories.fine_steps=3"],
        "M = 2, delta 1, with critics": [],
    }
    specs = [
        Spec("relay", name, settings=[*RELAYED, *ABSOLUTE, *own]) for name, own in forms.items()
    ]
    more_seeds = [replace(spec, seed=seed) for spec in (specs[0], specs[-1]) for seed in SEEDS[1:]]
    return [*specs, *more_seeds]


def longer() -> list[Spec]:
    """As long as the demo, with its weights: whether an order holds that was found in a third of
    the time. Updates are about as many as take the same time, by ``--costs`` and with an iteration
    with critics at 1.44 of the student's alone."""
    demo = [*FOLLOWED, *ABSOLUTE, *LAST_SLOT]
    specs = [
        Spec("longer", "with critics", settings=demo, updates=1900),
        Spec("longer", "no critics", settings=[*demo, *NO_CRITICS], updates=2400),
        Spec(
            "longer",
            "relayed, no critics",
            settings=[*RELAYED, *ABSOLUTE, *LAST_SLOT, *NO_CRITICS, *AHEAD, *OF_DEMO],
            updates=4000,
        ),
        Spec(
            "longer",
            "PCM",
            "pcm",
            ["student.learning_rate=2e-3", "critics.learning_rate=4e-3"],
            updates=2200,
        ),
    ]
    return [
        *(replace(spec, seed=seed) for seed in SEEDS for spec in specs),
        Spec("longer", "regression", "regression", FEW_FINE, updates=7000),
        Spec(
            "longer",
            "stored, 256 trajectories, no critics",
            settings=[*ABSOLUTE, *LAST_SLOT, *NO_CRITICS],
            first=256,
            updates=3200,
        ),
    ]


def textured(out: Path) -> list[Spec]:
    """In a world of more texture, once ``benchmarks/textured.py`` has built it: whether critics are
    worth more there, in which form, and what neighbours do there, at the rates that were best in
    the embedded world, in the time of its "equal time".
    """
    if not in_world(out / "textured"):
        return []
    stored, followed, relayed = ABSOLUTE, [*FOLLOWED, *ABSOLUTE], [*RELAYED, *ABSOLUTE]
    longer, name = [*relayed, *AHEAD, "trajectories.count=2000"], "relayed, absolute only"
    seeds = [
        Spec("textured", name, settings=[*relayed, *NO_CRITICS]),
        Spec("textured", f"{name}, with critics", settings=relayed),
        Spec("textured", f"{name}, equal time", settings=[*longer, *NO_CRITICS], updates=1297),
        Spec(
            "textured",
            f"{name}, with critics, equal time",
            settings=longer,
            updates=EQUAL_WITH_CRITICS,
        ),
        Spec(
            "textured",
            "PCM",
            "pcm",
            ["student.learning_rate=2e-3", "critics.learning_rate=4e-3"],
            updates=630,
        ),
        Spec("textured", "followed, absolute only", settings=[*followed, *NO_CRITICS]),
        Spec("textured", "followed, absolute only, with critics", settings=followed),
        Spec("textured", "stored, absolute only", settings=[*stored, *NO_CRITICS]),
        Spec("textured", "stored, absolute only, with critics", settings=stored),
    ]
    hinge, own_noise = (
        ["critics.loss=hinge"],
        ["critics.noise=independent", "critics.noise_power=1"],
    )
    others = [
        Spec("textured", f"{name}, with critics, hinge", settings=[*relayed, *hinge]),
        Spec("textured", f"{name}, with critics as PCM's", settings=[*relayed, *hinge, *own_noise]),
        Spec("textured", "regression", "regression", FEW_FINE, updates=1013),
    ]
    specs = [*(replace(spec, seed=seed) for seed in SEEDS for spec in seeds), *others]
    return [replace(spec, world="textured") for spec in specs]


def tables(lines: Sequence[Mapping[str, Any]], out: Path) -> dict[str, list[Spec]]:
    """All runs, by table, as far as they follow from those that are done."""
    named: dict[str, list[Spec]] = {}
    for spec in [
        *ablation(),
        *visits(),
        *neighbours(lines),
        *library(),
        *relay(),
        *longer(),
        *sweeps(),
        *textured(out),
    ]:
        named.setdefault(spec.table, []).append(spec)
    return named


# ---- RAPM, altered


class OwnStart(Players):
    """The frozen student's target starts one teacher step from the student's own position, not from
    the stored one."""

    def positions(self, slots: list[int], z: Tensor, batch: Batch) -> Positions:
        backbone, schedule, grid = self.backbone, self.schedule, self.grid
        at = super().positions(slots, z, batch)
        teacher = guided(backbone, self.unconditional, self.config.trajectories.guidance_scale)
        with backbone.role(TEACHER), torch.no_grad():  # batch size 1: a row is a slot
            t, s = (
                torch.tensor(times)
                for times in ([grid.coarse(n + 1) for n in slots], [grid.nudged(n) for n in slots])
            )
            nudged = schedule.step(at.start, teacher(at.start, t, at.conditioning), t, s)
        with backbone.role(STUDENT):
            return replace(
                at, relative=from_nudged(backbone, schedule, grid, slots, nudged, at.conditioning)
            )


def undetached_turn(
    players: Players, batch: Batch, renoising: Mapping[str, Any]
) -> tuple[dict[str, float], list[Walked]]:
    """A student's turn on distances alone whose gradient flows through all the student's steps
    before each slot."""
    assert not renoising
    backbone, schedule, grid = players.backbone, players.schedule, players.grid
    z, total, sums = (
        batch.coarse[:, grid.slots],
        torch.zeros(()),
        {"relative_distance": 0.0, "absolute_distance": 0.0},
    )
    with backbone.role(STUDENT):
        for n in reversed(range(grid.slots)):
            given = batch.coarse, batch.nudged, batch.conditioning
            at = positions(backbone, schedule, grid, [n], z.detach(), *given)
            z = student_step(backbone, schedule, grid, [n], z, at.conditioning)
            for kind, target in (("relative", at.relative), ("absolute", at.absolute)):
                distance = players.distance(z, target)
                total = total + (players.slot_weight(kind, [n], len(z)) * distance).sum()  # type: ignore[arg-type]
                sums[f"{kind}_distance"] += float(distance.detach().mean()) / grid.slots
        total.backward()
    return sums, []


def train_rapm(spec: Spec, run: Run, store: TrajectoryStore, teacher: Teacher) -> None:
    """``rapm``; ``rapm-undetached``, ``rapm-own-start`` and ``rapm-heads-only`` with one part of
    the library replaced."""
    turn, make = turns.student_turn, training.make_players

    def heads_only(config: Config, *given: Any) -> Players:
        players = make(config, *given)
        for role, learner in players.critics.items():
            rate, decay, assigned = (
                config.critics.learning_rate,
                config.training.weight_decay,
                learner.heads,
            )
            for p in learner.parameters.values():
                p.requires_grad_(False)
            assert assigned is not None
            assigned.requires_grad_(True)
            alone = Learner(players.backbone, "none", assigned, rate, (0.0, 0.999), decay)
            vars(learner).update(vars(alone), role=role)
        return players

    training.LONGEST_UNSAVED = math.inf  # a curve is of the checkpoints at its quarters
    if spec.method == "rapm-heads-only":
        training.make_players = heads_only
    if spec.method == "rapm-undetached":
        turns.student_turn = undetached_turn
    if spec.method == "rapm-own-start":
        training.make_players = lambda *given: OwnStart(**vars(make(*given)))
    try:
        if not training.train(
            run,
            load_backbone(teacher, run.config, run.config.torch_device),
            store,
            teacher.schedule,
        ):
            sys.exit(f"{spec.key} was stopped")
    finally:
        turns.student_turn, training.make_players = turn, make


# ---- neighbours


def pictures(home: Path) -> Pictures:
    """A world's rendered scenes of training captions, in latents; made once."""
    file, device = home / "pictures.safetensors", configuration.load(preset="toy").torch_device
    if not file.is_file():
        if in_world(home):
            rendered = np.load(home / "scenes.npy", mmap_mode="r")[:PICTURES]
            captions = json.loads((home / "scenes.json").read_text())[:PICTURES]
        else:
            drawn = [scenes.scene(100, k, "train") for k in range(PICTURES)]
            rendered, captions = scenes.render_many(drawn), [each.caption for each in drawn]
        studio = open_studio(
            Run(home / "stores", configuration.load(preset="toy", settings=in_world(home))),
            student=False,
        )
        pixels = torch.from_numpy(np.array(rendered)).permute(0, 3, 1, 2).float() / 127.5 - 1
        vae, latents = studio._pictures.vae, []
        with torch.no_grad():
            for batch in pixels.split(50):
                latents.append(
                    vae.encode(batch.to(vae.device)).latent_dist.mean * vae.config.scaling_factor
                )
        conditioning, _ = studio.encode(captions)
        save_tensors(
            file, {"latents": torch.cat(latents).cpu(), **with_prefix("conditioning", conditioning)}
        )
    tensors = {name: value.to(device) for name, value in load_tensors(file).items()}
    return Pictures(tensors["latents"], under_prefix("conditioning", tensors))


def make_method(
    spec: Spec, config: Config, teacher: Teacher, store: TrajectoryStore, given: Pictures
) -> tuple[World, Method]:
    family, device = teacher.family, given.latents.device.type

    def another(taps: Sequence[str]) -> Backbone:
        return Backbone(
            teacher.load_network(config.torch_dtype, device), family.call, family.lora_targets, taps
        )

    student = another(())
    student.add_role(STUDENT, config.student.rank, student.lora_targets, config.training.seed)
    world = World(
        config, student, teacher.schedule, config.grid(), store.unconditional, given, store
    )
    decay, betas = config.training.weight_decay, (0.9, 0.999)
    learner = Learner(student, STUDENT, None, config.student.learning_rate, betas, decay)
    if spec.method == "regression":
        return world, regression.Regression(world, learner)
    if spec.method == "lcm":
        return world, lcm.Lcm(world, learner)
    if spec.method == "dmd2":
        critic = another(())
        critic.add_role(
            dmd2.FAKE, config.student.rank, critic.lora_targets, config.training.seed + 1
        )
        fake = Learner(critic, dmd2.FAKE, None, config.critics.learning_rate, betas, decay)
        return world, dmd2.Dmd2(world, critic, learner, fake)
    assert spec.method == "pcm"
    form = pcm.FORMS["sdxl"]  # the heads of SD 1.5 would be larger than this network
    critic = another(pcm.taps(student.network, form))
    x0, conditioning = given.draw(torch.Generator(), 1)
    with torch.no_grad(), critic.role(TEACHER):
        channels = [
            x.shape[1] for x in critic.features(x0, torch.zeros(1, dtype=torch.long), conditioning)
        ]
    heads = pcm.Heads(channels, form, config.training.seed).to(device)
    of_heads = Learner(
        critic, "discriminator", heads, config.critics.learning_rate, (0.0, 0.999), decay
    )
    scale = config.trajectories.guidance_scale
    method = pcm.Pcm(
        student,
        critic,
        teacher.schedule,
        world.grid,
        learner,
        of_heads,
        store.unconditional,
        scale,
        given,
    )
    return world, method


def memory_of(spec: Spec) -> int:
    """Bytes of all tensors at the peak of a run's training, counted as `rapm plan` does: networks,
    what learns, its average and moments, gradients and activations."""
    config = spec.config(Path())
    teacher = teacher_of(config)
    if spec.method.startswith("rapm"):
        return sum(make_plan(config, teacher).memory["training"].values())
    stub: Any = Stub(config, teacher, "meta")
    conditioning = {name: value[None] for name, value in stub.trajectory.conditioning.items()}
    given = Pictures(stub.trajectory.coarse[:1], conditioning)
    world, method = make_method(spec, config, without_weights(teacher), stub, given)
    learners: dict[str, Learner] = {}
    peak = 0

    def take(turn: int) -> None:
        learners.update(
            {learner.role: learner for learner in method.iterate(turn, torch.Generator())[1]}
        )

    for turn in range(method.turns):
        peak = max(peak, count(lambda turn=turn: take(turn))[1])
        for learner in learners.values():
            learner.optimizer.zero_grad(set_to_none=True)
    networks = {
        world.student.network,
        *(part.network for part in vars(method).values() if isinstance(part, Backbone)),
    }
    heads = [learner.heads for learner in learners.values() if learner.heads]
    held = bytes_of(
        t for module in (*networks, *heads) for t in (*module.parameters(), *module.buffers())
    )
    moments = 2 * sum(bytes_of(iter(learner.parameters.values())) for learner in learners.values())
    return held + moments + bytes_of(iter(learners[STUDENT].parameters.values())) + peak


def train_neighbour(
    spec: Spec, run: Run, store: TrajectoryStore, teacher: Teacher, given: Pictures
) -> None:
    """The library's loop around another method's iteration: rates, clipping and averaging are the
    library's."""
    config = run.config
    world, method = make_method(spec, config, teacher, store, given)
    average = {name: p.detach().clone() for name, p in world.student.parameters(STUDENT).items()}
    started, settings = time.monotonic(), config.training
    by_update = config.model_copy(
        update={"training": settings.model_copy(update={"iterations": spec.updates})}
    )
    run.forget_metrics_from(0)
    for iteration in range(settings.iterations):
        generator = training._generator(settings.seed, spec.method, iteration)
        losses, learners = method.iterate(iteration, generator)
        for learner in learners:
            learner.clip(iteration, sum(losses.values()), settings.gradient_clip)
            learner.step(rate_factor(by_update, iteration // method.turns))
            if learner.role == STUDENT:
                update = iteration // method.turns
                weights = [p.detach() for p in learner.parameters.values()]
                get_ema_multi_avg_fn(min(config.student.ema, (1 + update) / (10 + update)))(
                    list(average.values()), weights, 0
                )
        run.log({"iteration": iteration, **losses, "seconds": round(time.monotonic() - started, 3)})
        if (iteration + 1) % settings.checkpoint_every == 0 or iteration + 1 == settings.iterations:
            run.save_checkpoint(iteration + 1, with_prefix("average", average))


# ---- scoring


class ConsistencyStudio(Studio):
    """Samples as LCM and DMD2 do: predicts the clean latent and noises it again, with noise that is
    a function of the seed."""

    @torch.no_grad()
    def latents(  # type: ignore[override]
        self,
        role: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_steps: int,
        batch_size: int | None = None,
    ) -> Tensor:
        conditioning, _ = self.encode(prompts)
        schedule, device = self.teacher.schedule, self.backbone.device
        z = torch.stack([picture_noise(seed, self.shape) for seed in seeds]).to(device)
        times = trailing_timesteps(num_steps)
        with self.backbone.role(role):
            for k, (t, s) in enumerate(pairwise(times)):
                x0 = schedule.x0_and_eps(
                    z, self.backbone(z, torch.full((len(z),), t), conditioning), t
                )[0]
                noise = torch.stack(
                    [picture_noise(seed * 100 + k + 1, self.shape) for seed in seeds]
                ).to(device)
                z = x0 if s < 0 else schedule.alpha(s, x0) * x0 + schedule.sigma(s, x0) * noise
        return z


def reference(home: Path) -> protocol.Measured:
    """A world's teacher at 20 steps on the validation captions; the second seeds for all of them,
    the first for the pairs."""
    file = home / "reference.safetensors"
    if not file.is_file():
        studio = open_studio(
            Run(Path("."), configuration.load(preset="toy", settings=in_world(home))), student=False
        )
        oracle = oracle_of(home)
        first, second = (
            [
                protocol.draw(studio, oracle, TEACHER, 20, "validation", (which, i))
                for i in range(0, captions, 50)
            ]
            for which, captions in (("first", protocol.PAIRS), ("second", protocol.CAPTIONS))
        )
        tensors = {
            "first": torch.cat([d[0] for d in first]),
            "second": torch.cat([d[0] for d in second]),
            "right": torch.cat([d[1] for d in [*first, *second]]).float(),
            "sharp": torch.cat([d[2] for d in second]),
        }
        save_tensors(file, tensors)
    return protocol.Measured(**load_tensors(file))


def scores(measured: protocol.Measured, many: protocol.Measured) -> dict[str, float]:
    """FID (with the deviation of a bootstrap over captions), caption accuracy, diversity and
    sharpness."""
    generator, n = torch.Generator().manual_seed(0), len(measured.first)
    again = []
    for _ in range(BOOTSTRAP):
        rows = torch.randint(n, (n,), generator=generator)
        again.append(frechet_distance(measured.first[rows], many.second))
    found = protocol.compared(measured, many)
    return {
        "fid": found["fid_to_teacher"],
        "fid_deviation": float(torch.tensor(again).std()),
        "accuracy": found["caption_accuracy"],
        "diversity": found["diversity"],
        "sharpness": found["sharpness"],
    }


def seconds_of(records: Sequence[Mapping[str, Any]], ahead: int) -> float:
    """What iterations take: of each kind of turn the median times their number, whatever else the
    machine did meanwhile. Where ``ahead`` of them walk side by side, the first takes the time of
    all, so they are looked at together."""
    kinds: dict[tuple[str, ...], list[tuple[float, int]]] = {}
    seconds, number = 0.0, 0
    for end in [*range(ahead, len(records), ahead), len(records)]:
        last, share = records[end - 1], (records[end - 1]["seconds"] - seconds) / (end - number)
        kinds.setdefault(tuple(last), []).append((share, end - number))
        seconds, number = last["seconds"], end
    return sum(
        sum(n for _, n in blocks) * statistics.median(share for share, _ in blocks)
        for blocks in kinds.values()
    )


def rollout_of_one(config: Config, teacher: Teacher) -> float:
    """Seconds that a stored trajectory takes."""
    settings, device = config.trajectories, config.torch_device
    rows, stub = min(settings.batch_size, settings.count), Stub(config, teacher, device)
    taken = duration(
        teacher_pass(config, load_backbone(teacher, config, device), stub, rows), device, 3
    )
    return taken * config.rolled_slots * settings.fine_steps / rows


def score_run(
    spec: Spec, run: Run, home: Path, rollout: float, stored: int
) -> list[dict[str, Any]]:
    """A line for each number of steps, and each quarter of a curve. ``rollout`` is of one of the
    ``stored`` trajectories."""
    oracle, many, lines = oracle_of(home), reference(home), []
    records = run.read_metrics()
    slots = run.config.trajectories.slots
    for step in run.checkpoint_steps() if spec.curve else run.checkpoint_steps()[-1:]:
        studio = open_studio(run)
        if spec.method in METHODS and METHODS[spec.method].stochastic:
            studio.__class__ = ConsistencyStudio
        studio.backbone.load(STUDENT, under_prefix("average", load_tensors(run._checkpoint(step))))
        last = step == run.config.training.iterations
        for steps in spec.steps if last and spec.steps else [slots]:
            measured = protocol.measure(studio, oracle, STUDENT, steps, "validation")
            found = scores(measured, many)
            cost = {
                "seconds": seconds_of(records[:step], run.config.training.walk_ahead),
                "rollout": rollout * min(step, stored),
            }
            lines.append(
                {
                    "iteration": step,
                    "updates": spec.updates_in(run.config, step),
                    "steps": steps,
                    **cost,
                    **found,
                }
            )
            if last and steps == slots:
                texts = scenes.captions(8, protocol.CAPTION_SEED, "validation")
                sheet(
                    [(spec.name, studio.images(STUDENT, texts, range(8), steps))],
                    run.folder / "pictures.png",
                )
    return lines


# ---- all


class View:
    """The first trajectories of a store, seen with fewer slots: of 8 slots of 5 steps every second
    one is one of 4 of 10."""

    def __init__(self, store: TrajectoryStore, count: int, slots: int) -> None:
        self.store, self.count, self.every = (
            store,
            count,
            store.manifest["facts"]["grid"][0] // slots,
        )
        self.manifest, self.unconditional = store.manifest, store.unconditional

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Trajectory:
        row = self.store[index]
        return replace(
            row, coarse=row.coarse[:: self.every], nudged=row.nudged[self.every - 1 :: self.every]
        )


def store_run(home: Path, config: Config) -> Run:
    """Where the trajectories are that a run's are seen in; shared by all runs of a world that can
    have them."""
    settings, delta = config.trajectories, config.trajectories.delta
    if (
        positions := config.training.positions
    ) != "stored":  # the noise, and the first slot or none
        return Run(
            home
            / "stores"
            / f"{settings.slots}x{settings.fine_steps}-{delta}-{settings.count}-{positions}",
            config,
        )
    fine = settings.slots * settings.fine_steps
    slots = (
        MOST_SLOTS
        if delta == 1 and MOST_SLOTS % settings.slots == 0 and fine % MOST_SLOTS == 0
        else settings.slots
    )
    own = settings.model_copy(update={"slots": slots, "fine_steps": fine // slots})
    name = f"{slots}x{fine // slots}-{delta}-{settings.count}"
    return Run(home / "stores" / name, config.model_copy(update={"trajectories": own}))


def make_stores(out: Path, specs: Sequence[Spec]) -> None:
    """The trajectories that runs take."""
    stores = [store_run(out / spec.world, spec.config(out)) for spec in specs]
    for run in {store.folder: store for store in stores}.values():
        make_trajectories(run)


def train_one(spec: Spec, out: Path) -> tuple[Run, TrajectoryStore]:
    """Trains one run, unless it is trained, on the trajectories that are returned with it."""
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    config = spec.config(out)
    run = Run.open(out / "runs" / spec.key.replace(" ", "-"), config)
    teacher, stored = (
        teacher_of(config),
        TrajectoryStore.open(store_run(out / spec.world, config).trajectories),
    )
    store: Any = View(stored, spec.first or len(stored), config.trajectories.slots)
    if run.checkpoint_steps()[-1:] != [config.training.iterations]:
        if spec.method.startswith("rapm"):
            train_rapm(spec, run, store, teacher)
        else:
            train_neighbour(spec, run, store, teacher, pictures(out / spec.world))
    return run, store


def execute(spec: Spec, out: Path) -> dict[str, Any]:
    """Trains and scores one run."""
    run, store = train_one(spec, out)
    rollout = rollout_of_one(run.config, teacher_of(run.config)) if spec.uses_store else 0.0
    lines = score_run(spec, run, out / spec.world, rollout, len(store))
    return {
        "key": spec.key,
        **asdict(spec),
        "iterations": run.config.training.iterations,
        "lines": lines,
    }


def costs(out: Path, rounds: int = 3, updates: int = 30) -> dict[str, Any]:
    """What an update of each method takes, with the rollout of one trajectory where there is one:
    medians of short runs made by turns in one process, so that none has the machine's better hour.
    And how many take as long as ``UPDATES`` of the first."""
    specs = [spec for spec in neighbours([]) if spec.name.endswith(f"rate {RATES[0]:g}")]
    make_stores(out, specs)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for name in ("stores", "pictures.safetensors"):
            if (out / name).exists():
                (Path(folder) / name).symlink_to((out / name).resolve())
        for number in range(rounds):
            for spec in specs:
                short = replace(spec, seed=number, updates=updates)
                run, _ = train_one(short, Path(folder))
                a_trajectory = (
                    rollout_of_one(run.config, teacher_of(run.config)) if spec.uses_store else 0.0
                )
                taken = {
                    "update": seconds_of(run.read_metrics(), run.config.training.walk_ahead)
                    / updates,
                    "trajectory": a_trajectory,
                }
                found.setdefault(spec.name.rpartition(", rate")[0], []).append(taken)
    medians = {
        name: {part: statistics.median(each[part] for each in all_taken) for part in all_taken[0]}
        for name, all_taken in found.items()
    }
    counts = [spec.config(out).trajectories.count for spec in specs]
    whole = UPDATES * sum(medians[specs[0].name.rpartition(", rate")[0]].values())
    return {
        name: {**taken, "updates": updates_in_time(whole, count=count, **taken)}
        for (name, taken), count in zip(medians.items(), counts, strict=True)
    }


def updates_in_time(whole: float, update: float, trajectory: float, count: int) -> int:
    """As take so many seconds with the rollout, each on a trajectory of its own until there are no
    more of ``count``."""
    with_new = whole / (update + trajectory)
    return round(with_new if with_new <= count else (whole - count * trajectory) / update)


def read(out: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def run_all(out: Path, left: Sequence[Spec], jobs: int) -> None:
    """Runs side by side, each in its own process on its own core."""
    make_stores(out, left)
    for world in {spec.world for spec in left}:
        reference(out / world)
    for world in {spec.world for spec in left if spec.method in METHODS}:
        pictures(out / world)
    cores: Queue[int] = Queue()
    for core in range(jobs):
        cores.put(core)

    def one(spec: Spec) -> None:
        core = cores.get()
        command = [sys.executable, __file__, "--out", str(out), "--key", spec.key]
        if hasattr(os, "sched_setaffinity") and not torch.cuda.is_available():
            command = ["taskset", "-c", str(core), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        cores.put(core)
        said = (result.stderr.strip() or "?").splitlines()[-1]
        diverged = NonFinite.__name__ in said
        if result.returncode and not diverged:  # a mistake, or stopped: to be run again
            print(f"{spec.key}: {said}", flush=True)
            return
        failed = {"key": spec.key, **asdict(spec), "lines": [], "error": said}
        line = json.dumps(failed) if diverged else result.stdout.strip().splitlines()[-1]
        with (out / "results.jsonl").open("a") as file:
            file.write(line + "\n")
        found = (
            said
            if diverged
            else {name: round(value, 3) for name, value in json.loads(line)["lines"][-1].items()}
        )
        print(spec.key, found, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, left))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", default="", help="run this one only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="runs whose key has this in it")
    parser.add_argument("--list", action="store_true", help="say what there is to do")
    parser.add_argument(
        "--costs",
        action="store_true",
        help="time an update of each method, one after the other, and no more",
    )
    parser.add_argument("--key", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.costs:
        line = {"key": "costs", "table": "costs", "lines": [], "seconds": costs(arguments.out)}
        with (arguments.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line["seconds"], indent=1))
        return
    tried: set[str] = set()
    while True:
        done = read(arguments.out)
        every = tables(done, arguments.out)
        chosen = [
            spec for name, specs in every.items() if arguments.table in ("", name) for spec in specs
        ]
        if arguments.key:
            print(
                json.dumps(
                    execute(
                        next(spec for spec in chosen if spec.key == arguments.key), arguments.out
                    )
                )
            )
            return
        finished = {line["key"] for line in done} | tried
        left = [spec for spec in chosen if arguments.only in spec.key and spec.key not in finished]
        if arguments.list:
            print("\n".join(spec.key for spec in left))
        if arguments.list or not left:
            return
        run_all(arguments.out, left, arguments.jobs)
        tried |= {spec.key for spec in left}  # what failed is not tried for ever


if __name__ == "__main__":
    main()

"""Small distillations of the toy teacher: trained, scored on the way, each kept as one JSON line.

``main`` is the command line of a script that lists its runs in tables, such as paper.py::

    python benchmarks/paper.py --list                 # what is done, and what there is to do
    python benchmarks/paper.py                        # all of it; stop it and go on as you like
    python benchmarks/paper.py --table open --jobs 2  # one table, two runs side by side
    python benchmarks/paper.py --key "RAPM/0"         # one run, in this process

Runs go side by side, each in a process of one thread. Every run is trained by
:func:`rapm.train.train` in a folder of its own, OUT/runs/KEY, and goes on from its newest
checkpoint. Its scores are kept in that folder as they come. A finished run is a line of
benchmarks/results/SCRIPT.jsonl. A run may stand in several tables; it is made once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from baselines import Pictures, dmd2, lcm, pcm, regression
from machine import processor
from rapm import settings
from rapm.config import Config
from rapm.errors import NonFinite, UserError
from rapm.evaluate.toy import load_reference
from rapm.io import load_tensors, save_tensors, under_prefix, with_prefix, write_json
from rapm.methods import METHODS, Method
from rapm.models.resolve import teacher_of
from rapm.models.teacher import Teacher, load_backbone
from rapm.pipeline import facts_of, make_trajectories
from rapm.run import Run
from rapm.status import training_seconds
from rapm.toy import scenes
from rapm.toy.scenes import Split
from rapm.train import train
from rapm.trajectories import TrajectoryStore, fingerprint
from rapm.versions import versions
from scoring import rollout_seconds, scorer

RESULTS = Path(__file__).parent / "results"
OTHERS = ("pcm", "lcm", "regression", "dmd2")  # methods that are not the library's
PICTURES, PICTURES_SEED = 2000, 100  # rendered scenes for methods that take pictures
Score = Callable[[int], Mapping[str, float]]


@dataclass(frozen=True)
class Spec:
    """A run of the toy teacher.

    RAPM and other papers' methods have preset ``toy-paper``, midpoint has ``toy``. The presets'
    rates do not fall before the end: an earlier point is what a shorter run would have ended with.
    (Midpoint's do fall.)

    Attributes:
        name: of the variant, the same for all its seeds.
        method: one of the library's, or of ``OTHERS``.
        settings: beyond the preset, ``section.key=value`` each.
        seed: the training's; the trajectories are the same for all.
        iterations: the length of the run.
        test_at: iterations after which it is scored on the test captions.
        validation_at: and on the validation captions.
        steps: numbers of sampling steps that are scored at the end; N alone when empty.
    """

    name: str
    method: str = "rapm"
    settings: tuple[str, ...] = ()
    seed: int = 0
    iterations: int = 20_000
    test_at: tuple[int, ...] = ()
    validation_at: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.name}/{self.seed}"

    @property
    def score_at(self) -> dict[Split, tuple[int, ...]]:
        """Iterations after which it is scored, by whose captions."""
        both: dict[Split, tuple[int, ...]]
        both = {"test": self.test_at, "validation": self.validation_at}
        return {split: places for split, places in both.items() if places}

    @property
    def folder(self) -> str:
        """The run's folder, without what makes trouble in a name."""
        return re.sub(r"[^\w.=+-]+", "-", self.key)

    def config(self) -> Config:
        """Its settings.

        Raises:
            UserError: they are no settings.
        """
        own = [
            f"training.iterations={self.iterations}",
            f"training.seed={self.seed}",
            f"samples.every={math.gcd(*self.test_at, *self.validation_at)}",
        ]
        of_library = self.method if self.method in METHODS else "rapm"
        preset = "toy-paper" if of_library == "rapm" else "toy"
        return settings.load(method=of_library, preset=preset, settings=[*self.settings, *own])


# ---- one run


def execute(spec: Spec, out: Path) -> dict[str, Any]:
    """Trains and scores a run, or goes on with it. Returns its line.

    Raises:
        SystemExit: the user stopped it; it can go on.
    """
    run = Run.open(out / "runs" / spec.folder, spec.config())
    line: dict[str, Any] = {"key": spec.key, **asdict(spec)}
    with run.locked():
        write_json(run.folder / "spec.json", asdict(spec))
        store, teacher = shared_store(run, out / "stores"), teacher_of(run.config)
        method = make_method(spec, run.config, teacher, store, out)
        points = Points(spec, run, {s: scorer(method, teacher, s) for s in spec.score_at})
        try:
            if not train_and_score(run, method, store, points):
                sys.exit(f"{spec.key} was stopped; the same command goes on")
        except NonFinite as error:  # a result, too
            line["error"] = str(error)
    line["rollout_seconds"] = round(rollout_seconds(method, store), 1)
    line["points"] = points.known
    return line | {"versions": versions(), "processor": processor()}


def train_and_score(
    run: Run, method: Method, store: TrajectoryStore, sample: Callable[[int], None]
) -> bool:
    """:func:`rapm.train.train`, after the scores that a kill after a checkpoint may have cost."""
    first, state = run.load_checkpoint()
    if first:
        for name, learner in method.learners.items():
            learner.load_state(under_prefix(name, state))
        sample(first)
    return train(run, method, store, sample)


class Points:
    """Scores along a run, kept in its folder; called while it trains.

    Args:
        scores: by split, ``(num_steps) -> scores`` of the student as it stands.
    """

    def __init__(self, spec: Spec, run: Run, scores: Mapping[Split, Score]) -> None:
        self.spec, self.run, self.scores = spec, run, scores
        self.file = run.folder / "points.json"
        self.known: list[dict[str, Any]] = []
        if self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def __call__(self, iteration: int) -> None:
        spec = self.spec
        steps = [self.run.config.trajectories.slots]
        if iteration == spec.iterations and spec.steps:
            steps = [*spec.steps]
        known = {(point["split"], point["iteration"], point["steps"]) for point in self.known}
        due = [split for split, places in spec.score_at.items() if iteration in places]
        for split, num_steps in product(due, steps):
            if (split, iteration, num_steps) in known:
                continue
            records = self.run.read_metrics()[:iteration]
            point = {"split": split, "iteration": iteration, "steps": num_steps}
            point["seconds"] = round(training_seconds(records), 1)
            self.known.append(point | self.scores[split](num_steps))
            write_json(self.file, self.known)


def shared_store(run: Run, stores: Path) -> TrajectoryStore:
    """A run's trajectories: those of all runs with equal facts, made once; the run has a link."""
    config = run.config
    mark = fingerprint(facts_of(config))[:16]
    stores.mkdir(parents=True, exist_ok=True)
    with FileLock(stores / f"{mark}.lock"):
        store = make_trajectories(Run(stores / mark, config))
    if not run.trajectories.is_symlink():
        run.trajectories.symlink_to(os.path.relpath(store.folder, run.folder))
    return store


def make_method(
    spec: Spec, config: Config, teacher: Teacher, store: TrajectoryStore, out: Path
) -> Method:
    """The method that a spec names, on a network of its own."""
    device = config.torch_device
    given = config, load_backbone(teacher, config, device), teacher.schedule, store
    if spec.method in METHODS:
        return METHODS[spec.method](*given)
    if spec.method == "regression":
        return regression.Regression(*given)
    if spec.method == "dmd2":
        return dmd2.Dmd2(*given)
    shown = pictures(out / "pictures.safetensors", teacher, device)
    if spec.method == "lcm":
        return lcm.Lcm(*given, shown)
    assert spec.method == "pcm"
    form = pcm.FORMS["sdxl"]  # the heads of SD 1.5 would be larger than this network
    return pcm.Pcm(*given, shown, pcm.second_network(teacher, config, form, device), form)


@torch.no_grad()
def pictures(file: Path, teacher: Teacher, device: str) -> Pictures:
    """Rendered scenes of training captions, in latents; made once."""
    with FileLock(f"{file}.lock"):
        if not file.is_file():
            drawn = [scenes.scene(PICTURES_SEED, k, "train") for k in range(PICTURES)]
            images = torch.from_numpy(scenes.render_many(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
            vae = teacher.load(["vae"], torch.float32, device).vae
            means = [vae.encode(x.to(device)).latent_dist.mean for x in images.split(50)]
            texts = teacher.load(teacher.family.text_parts, torch.float32, device)
            conditioning = teacher.family.encode(texts, [scene.caption for scene in drawn])
            latents = torch.cat(means) * vae.config.scaling_factor
            save_tensors(file, {"latents": latents} | with_prefix("prompt", conditioning))
    tensors = {name: value.to(device) for name, value in load_tensors(file).items()}
    return Pictures(tensors["latents"], under_prefix("prompt", tensors))


# ---- many


def unique(tables: Mapping[str, Sequence[Spec]]) -> dict[str, Spec]:
    """All runs by key, in their order."""
    found: dict[str, Spec] = {}
    for spec in (spec for specs in tables.values() for spec in specs):
        assert found.setdefault(spec.key, spec) == spec, f"two runs are called {spec.key}"
    return found


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The finished runs' lines by key, the newest of each."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return {line["key"]: line for line in map(json.loads, lines)}


def run_all(specs: Sequence[Spec], script: str, out: Path, results: Path, jobs: int) -> None:
    """Runs side by side, each in a process of one thread; they write their lines themselves."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    working: set[subprocess.Popen[bytes]] = set()

    def one(spec: Spec) -> None:
        log = out / "logs" / f"{spec.folder}.txt"
        given = ["--out", str(out), "--results", str(results), "--key", spec.key]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, script, *given],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a Ctrl-C comes to it once, from here
            )
            working.add(process)
            failed = process.wait()
            working.discard(process)
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        what = said[-1] if failed and said else described(read(results).get(spec.key, {}))
        print(f"{spec.key}: {what}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, specs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*working]:
                process.terminate()  # it writes a checkpoint first
            sys.exit("stopped; the same command goes on")


def described(line: Mapping[str, Any]) -> str:
    """A finished run in short."""
    if not line.get("points") or "error" in line:
        return str(line.get("error", "no points"))
    point = line["points"][-1]
    fid, captions = point["fid"], point["captions"]
    return f"{point['split']} FID {fid:.3f}, captions {captions:.3f}"


def state(spec: Spec, out: Path, done: Mapping[str, Mapping[str, Any]]) -> str:
    """How far a run is, in words."""
    if spec.key in done:
        return described(done[spec.key])
    files = (out / "runs" / spec.folder / "checkpoints").glob("step-*.safetensors")
    newest = max((int(file.stem.removeprefix("step-")) for file in files), default=0)
    return f"{newest:,} of {spec.iterations:,} iterations"


def main(tables: Mapping[str, Sequence[Spec]], script: str) -> None:
    """The command line.

    Args:
        tables: runs by table.
        script: the file that is run, ``__file__``.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".paper"), help="runs and trajectories")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / f"{Path(script).stem}.jsonl", help="finished runs"
    )
    parser.add_argument("--table", choices=[*tables], help="the runs of this table alone")
    parser.add_argument("--only", default="", help="runs whose key has this in it")
    parser.add_argument("--key", help="this run alone, in this process")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--list", action="store_true", help="say how far each run is")
    given = parser.parse_args()
    chosen = unique({given.table: tables[given.table]} if given.table else tables)
    if given.key is not None and given.key not in chosen:
        parser.error(f"there is no run {given.key!r}; see --list")
    done = read(given.results)
    if given.key is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        line = execute(chosen[given.key], given.out)
        given.results.parent.mkdir(parents=True, exist_ok=True)
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return
    specs = [spec for spec in chosen.values() if given.only in spec.key]
    if given.list:
        print("\n".join(f"{spec.key}: {state(spec, given.out, done)}" for spec in specs))
        return
    left = [spec for spec in specs if spec.key not in done]
    for split in {split for spec in left for split in spec.score_at}:
        try:
            load_reference(split)  # before hours of training
        except UserError as error:
            parser.error(str(error))
    run_all(left, script, given.out, given.results, given.jobs)

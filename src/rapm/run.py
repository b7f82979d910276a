"""The folder of a run: its configuration, metrics and checkpoints, and the rules for going on with
it.

``config.toml trajectories/ checkpoints/ samples/ metrics.jsonl export/ scores.json``
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from rapm import settings
from rapm.config import Config
from rapm.errors import UserError
from rapm.io import load_metadata, load_tensors, save_tensors, write_text
from rapm.trajectories import read_manifest
from rapm.versions import versions


def _is_foreign(file: Path) -> bool:
    """Whether it is neither a run's trajectories nor the leftover of a process that was killed."""
    return file.name not in ("trajectories", ".lock") and not file.name.endswith(".partial")


class Run:
    """A run's folder, made or gone on with by :meth:`open`, read by :meth:`existing`."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.trajectories = folder / "trajectories"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"
        self.metrics = folder / "metrics.jsonl"
        self.export = folder / "export"
        self.scores = folder / "scores.json"

    @classmethod
    def open(cls, folder: Path, config: Config) -> Run:
        """Creates a run, or goes on with one. Until there is a checkpoint its settings may still be
        changed.

        Raises:
            UserError: the folder holds a run that was trained with settings that compute another
                result, or is no run at all; or another process is at it.
        """
        file = folder / "config.toml"
        is_run = file.is_file()
        if not is_run and (
            folder.is_file() or (folder.is_dir() and any(map(_is_foreign, folder.iterdir())))
        ):
            raise UserError(
                f"{folder} is not empty and holds no run (no config.toml); choose another --out"
            )
        cls.check_method(folder, config)
        run = cls(folder, config)
        with run.locked():  # else the settings of a run that is at work would be replaced
            run.load_checkpoint()  # refuses settings that are not the checkpoint's
            write_text(file, settings.dump(config))
        return run

    @classmethod
    def check_method(cls, folder: Path, config: Config) -> None:
        """
        Raises:
            UserError: the folder holds a run of another method, or of an older version.
        """
        if (folder / "config.toml").is_file():
            before = cls.existing(folder).config.method
            if before != config.method:
                raise UserError(
                    f"{folder} holds a run of method '{before}', not '{config.method}'; choose "
                    "another --out"
                )

    @classmethod
    def existing(cls, folder: Path) -> Run:
        """Reopens a run with its own settings.

        Raises:
            UserError: there is none.
        """
        file = folder / "config.toml"
        if not file.is_file():
            raise UserError(f"{folder} holds no run (no config.toml in it)")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not a TOML file: {error}") from None
        return cls(folder, settings.read_run(text, str(file)))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from working on this run; the system lets go of it however this
        process ends.

        Raises:
            UserError: another process is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise UserError(
                f"another process is working on {self.folder}; wait for it or choose another --out"
            ) from None

    # ---- checkpoints

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def checkpoint_steps(self) -> list[int]:
        return sorted(
            int(file.stem.removeprefix("step-"))
            for file in self.checkpoints.glob("step-*.safetensors")
        )

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a checkpoint, then deletes those beyond ``keep_checkpoints``.

        Raises:
            UserError: the disk is full; older checkpoints are untouched.
        """
        try:
            # In one entry: safetensors writes several in any order, and equal runs leave equal
            # files.
            made = json.dumps({"config": settings.dump(self.config), "versions": versions()})
            save_tensors(self._checkpoint(step), tensors, {"made": made})
        except OSError as error:
            raise UserError(
                f"checkpoint {step} could not be written ({error}); earlier checkpoints are whole: "
                f"make room and run again"
            ) from None
        for old in self.checkpoint_steps()[: -self.config.training.keep_checkpoints]:
            # Windows keeps what another program is reading; it goes the next time.
            with suppress(OSError):
                self._checkpoint(old).unlink()

    def load_checkpoint(self) -> tuple[int, dict[str, Tensor]]:
        """The newest checkpoint and its step; (0, {}) when there is none.

        Raises:
            UserError: it is damaged, or it was trained with settings that compute another result
                than this run's.
        """
        steps = self.checkpoint_steps()
        if not steps:
            return 0, {}
        file = self._checkpoint(steps[-1])
        try:
            # Copied: what is read is mapped from the file, and Windows deletes no file that is.
            tensors = {name: value.clone() for name, value in load_tensors(file).items()}
            made = json.loads(load_metadata(file).get("made", "{}"))
        except SafetensorError as error:
            raise UserError(
                f"{file} is damaged ({error}); delete it to go on from the one before"
            ) from None
        before = settings.read_run(made.get("config", ""), str(file))
        # Whoever uses the run holds teacher and prompts against the manifest.
        known = read_manifest(self.trajectories) is not None
        changed = settings.differences(before, self.config, may_have_moved=known)
        if changed:
            raise UserError(
                f"{self.folder} holds a run with other settings "
                f"({'; '.join(changed[:4])}{' ...' if changed[4:] else ''}); "
                "give the same settings to go on with it, or another --out"
            )
        return steps[-1], tensors

    # ---- metrics

    def log(self, record: Mapping[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        return [
            json.loads(line) for line in lines if line.endswith("}")
        ]  # a kill may have cut the last line

    def forget_metrics_from(self, step: int) -> None:
        """Drops what was logged at or after ``step``: it is about to be computed again."""
        kept = [
            json.dumps(record) + "\n"
            for record in self.read_metrics()
            if record["iteration"] < step
        ]
        write_text(self.metrics, "".join(kept))

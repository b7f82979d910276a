"""The folder of a run: its configuration, metrics and checkpoints, and the rules for going on with
it.

``config.toml plan.txt trajectories/ metrics.jsonl checkpoints/ samples/ samples.jsonl report.html
export/ scores-*.json``
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from rapm import settings
from rapm.config import Config
from rapm.errors import UserError
from rapm.io import (
    Damaged,
    NoFile,
    is_leftover,
    load_checked,
    load_made,
    read,
    save_checked,
    sha256,
    sweep,
    sync,
    write_text,
)
from rapm.records import append_record, forget_from, read_records
from rapm.text import is_unicode
from rapm.trajectories import read_manifest
from rapm.versions import versions


def _is_foreign(file: Path) -> bool:
    """Whether it is neither a run's trajectories nor the leftover of a process that was killed."""
    return file.name not in ("trajectories", ".lock") and not is_leftover(file)


class Run:
    """A run's folder, made or gone on with by :meth:`open`, read by :meth:`existing`."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.trajectories = folder / "trajectories"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"
        self.metrics = folder / "metrics.jsonl"
        self.measures = folder / "samples.jsonl"
        self.export = folder / "export"
        self.plan = folder / "plan.txt"
        self.page = folder / "report.html"
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # of what is logged
        self._lock = FileLock(folder / ".lock", timeout=0)
        self._settings_are_new = False  # to be written once the folder is locked

    @classmethod
    def open(cls, folder: Path, config: Config, *, patience: float = 0) -> Run:
        """Creates a run, or goes on with one. Until there is a checkpoint its settings may still be
        changed. Another process that works on it is waited for, ``patience`` seconds.

        Raises:
            UserError: the folder holds a run that was trained with settings that compute another
                result, or is no run at all; or another process is at it.
        """
        if not is_unicode(str(folder)):
            raise UserError(f"the name of {folder} is not UTF-8 text; choose another --out")
        if not (folder / "config.toml").is_file() and (
            folder.is_file() or (folder.is_dir() and any(map(_is_foreign, folder.iterdir())))
        ):
            raise UserError(
                f"{folder} is not empty and holds no run (no config.toml); choose another --out"
            )
        cls.check_method(folder, config)  # before the lock, which makes the folder
        run = cls(folder, config)
        run._settings_are_new = True
        with run.locked(patience):
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
        try:
            text = read(file).decode()
        except NoFile:
            raise UserError(f"{folder} holds no run (no config.toml in it)") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not a TOML file: {error}") from None
        return cls(folder, settings.read_run(text, str(file)))

    @contextmanager
    def locked(self, patience: float = 0) -> Iterator[None]:
        """Keeps other processes from working on this run; the system lets go of it however this
        process ends. Within it this run may be locked again.

        Raises:
            UserError: another process is at it, or its settings are not those of its checkpoint.
        """
        if self._lock.is_locked:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=patience)
        except Timeout:
            raise UserError(
                f"another process is working on {self.folder}; wait for it or choose another --out"
            ) from None
        except (OSError, NotImplementedError) as error:  # some network drives have no locks
            raise UserError(
                f"{self.folder} cannot be locked ({error}); a run needs a folder that may be "
                "written, on a file system with locks: choose another --out"
            ) from None
        try:
            self._take_over()
            yield
        finally:
            self._lock.release()

    def _take_over(self) -> None:
        """Puts the folder in order. Under the lock, as whoever had it before may have changed what
        was checked without it."""
        file = self.folder / "config.toml"
        if self._settings_are_new:
            self.check_method(self.folder, self.config)
        elif file.is_file() and self.existing(self.folder).config != self.config:
            raise UserError(f"{file} was changed by another command meanwhile; run this one again")
        steps = self.checkpoint_steps()
        if steps:
            self._check_made(steps)
        text = settings.dump(self.config)
        if self._settings_are_new and not (file.is_file() and read(file) == text.encode()):
            write_text(file, text)
        # Not that of trajectories: several processes may be at them.
        for folder in (self.folder, self.checkpoints, self.samples, self.export):
            sweep(folder)
        self._forget_checkpoints()

    # ---- checkpoints

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.safetensors"

    def checkpoint_steps(self) -> list[int]:
        """Of all checkpoints there are.

        Raises:
            UserError: their folder cannot be looked into.
        """
        try:
            names = [file.name for file in self.checkpoints.iterdir() if file.is_file()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.checkpoints} cannot be read: {error.strerror}") from None
        found = (re.fullmatch(r"step-(\d{8,})\.safetensors", name) for name in names)
        return sorted(int(match[1]) for match in found if match)  # others are somebody's copies

    def newest_checkpoint(self) -> tuple[int, str]:
        """Its step and a digest; (0, "") where there is none."""
        step = max(self.checkpoint_steps(), default=0)
        return step, self.checkpoint_digest(step) if step else ""

    def checkpoint_digest(self, step: int) -> str:
        return sha256(self._checkpoint(step))

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes a checkpoint, then deletes those beyond ``keep_checkpoints``.

        Raises:
            UserError: the disk is full; older checkpoints are untouched.
        """
        store = read_manifest(self.trajectories)
        made = {
            "config": settings.dump(self.config),
            "versions": versions(),
            "step": step,
            "trajectories": store and store["fingerprint"],
        }
        try:
            save_checked(self._checkpoint(step), tensors, made)
            if self.metrics.is_file():
                sync(self.metrics)
        except OSError as error:
            raise UserError(
                f"{error}; earlier checkpoints are whole: make room and run again"
            ) from None
        self._forget_checkpoints()

    def _forget_checkpoints(self) -> None:
        for old in self.checkpoint_steps()[: -self.config.training.keep_checkpoints]:
            # Windows keeps what another program is reading; it goes the next time.
            with suppress(OSError):
                self._checkpoint(old).unlink()

    def load_checkpoint(self, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
        """The newest checkpoint and its step, or another one's; (0, {}) when there is none.

        Raises:
            UserError: it is damaged or gone, or it was trained with settings that compute another
                result than this run's, or on other trajectories.
        """
        steps = [k for k in self.checkpoint_steps() if step is None or k <= step]
        if step is not None and step not in steps:
            there = ", ".join(map(str, self.checkpoint_steps())) or "none"
            raise UserError(f"there is no checkpoint of iteration {step}; there are: {there}")
        if not steps:
            return 0, {}
        self._check_made(steps)
        with _older_one_offered(steps):
            _, tensors = load_checked(self._checkpoint(steps[-1]))
        return steps[-1], tensors

    def _check_made(self, steps: Sequence[int]) -> None:
        """Whether the newest checkpoint is this run's, by what it says of itself.

        Raises:
            UserError: it is not, or it is damaged.
        """
        file, step = self._checkpoint(steps[-1]), steps[-1]
        with _older_one_offered(steps):
            made = load_made(file)
            config = made.get("config", "")
            if not isinstance(config, str):
                raise Damaged(f"{file} is damaged (its settings are no text)")
        before = settings.read_run(config, str(file))
        store = read_manifest(self.trajectories)
        # Whoever uses the run holds teacher and prompts against the manifest.
        changed = settings.differences(before, self.config, may_have_moved=store is not None)
        if changed:
            raise UserError(
                f"{self.folder} holds a run with other settings "
                f"({'; '.join(changed[:4])}{' ...' if changed[4:] else ''}); "
                "give the same settings to go on with it, or another --out"
            )
        of_another = made.get("step") != step or (
            store is not None and made.get("trajectories") != store["fingerprint"]
        )
        if of_another:
            with _older_one_offered(steps):
                raise Damaged(f"{file} is a checkpoint of another run, or of another iteration")

    # ---- metrics

    def log(self, record: Mapping[str, Any]) -> None:
        append_record(self.metrics, record)
        for listener in self.listeners:
            listener(record)

    def log_sample(self, record: Mapping[str, Any]) -> None:
        append_record(self.measures, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """A record for each iteration; raises UserError where a line is none."""
        return read_records(self.metrics)

    def read_samples(self) -> list[dict[str, Any]]:
        """The same for each time of samples; its ``iteration`` is how many were done."""
        return read_records(self.measures)

    def forget_metrics_from(self, step: int) -> None:
        """Drops what was logged at or after ``step``: it is about to be computed again."""
        for file in (self.metrics, self.measures):
            forget_from(file, step)


@contextmanager
def _older_one_offered(steps: Sequence[int]) -> Iterator[None]:
    """Says what a damaged newest checkpoint leaves to do."""
    try:
        yield
    except Damaged as error:
        rest = f"go on from iteration {steps[-2]:,}" if steps[1:] else "train from the start"
        raise UserError(f"{error}; delete it to {rest}") from None

"""Trajectories by several processes at once: the store of one, to the bit."""

from __future__ import annotations

import filecmp
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import changed
from rapm.config import Config
from rapm.errors import UserError
from rapm.pipeline import facts_of, make_share, make_trajectories
from rapm.rollout import merge
from rapm.run import Run
from rapm.trajectories import shard_name

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from rapm import rollout
from rapm.prompts import Prompt

rollout.POLL = 0.05

def roll(z, conditioning):
    time.sleep(float(sys.argv[2]))
    return torch.stack([z, 2 * z, z + conditioning["a"]], 1), torch.stack([3 * z, 4 * z], 1)

contents = rollout.Contents(
    prompts=[Prompt("a"), Prompt("b"), Prompt("c")],
    conditioning={"a": torch.arange(3.0).view(3, 1, 1, 1)},
    unconditional={"a": torch.zeros(1, 1, 1, 1)},
    sizes=[((1, 4, 4), {})],
    count=20,
    seed=0,
    shard_size=2,
    facts={"count": 20, "seed": 0, "shard_size": 2},
)
store = rollout.make_store(Path(sys.argv[1]), contents, roll, batch_size=2)
print(len(store))
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_three_processes_make_the_store_of_one(tmp_path: Path) -> None:
    """One of them is killed within a shard, which another makes."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    shared.mkdir()
    (shared / ".tmpZ_9xyz").write_text("what a write that was killed left")
    killed = start(shared, 60)
    while not list(shared.glob(".*.lock")):
        assert killed.poll() is None
        time.sleep(0.05)
    others = [start(shared, 0.05), start(shared, 0.05)]
    last = shared / shard_name(9)
    while not last.is_file():
        assert others[0].poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    single = start(alone, 0)
    for each in (*others, single):
        assert each.communicate(timeout=60)[0] == "20\n"
        assert each.returncode == 0
    killed.communicate()
    names = sorted(file.name for file in alone.iterdir())
    assert sorted(file.name for file in shared.iterdir()) == names  # nor is a claim left
    assert len(names) == 13
    assert filecmp.cmpfiles(shared, alone, names, shallow=False) == (names, [], [])


def test_shares_in_folders_of_their_own_come_together(tiny_config: Config, tmp_path: Path) -> None:
    config = changed(tiny_config, trajectories={"shard_size": 2})
    whole, a, b = (Run.open(tmp_path / name, config) for name in ("whole", "a", "b"))
    make_trajectories(whole)
    assert make_share(a, (0, 2)) is None
    assert sorted(file.name for file in a.trajectories.glob("s*")) == [shard_name(0), shard_name(2)]
    assert make_share(b, (1, 2)) is None
    store = make_share(b, (1, 2), [a.folder])
    assert store is not None and len(store) == 6
    names = [file.name for file in whole.trajectories.iterdir()]
    assert filecmp.cmpfiles(whole.trajectories, b.trajectories, names, shallow=False)[0] == names
    other = changed(config, trajectories={"seed": 1})
    with pytest.raises(UserError, match="made with other settings"):
        merge(tmp_path, a.trajectories, facts_of(other))

"""Who may import whom, and what nobody may do, by the sources themselves."""

import ast
import sys
from pathlib import Path

import pytest

import rapm

SOURCES = Path(rapm.__file__).parent
TREES = {
    file.relative_to(SOURCES).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted(SOURCES.rglob("*.py"))
}
PRINTING = ["cli.py", "toy/build.py", "toy/fit.py", "toy/score.py"]


def imported(tree):
    """Modules that a source names in its imports, wherever they stand: ``from a import b`` gives a
    and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module, package):
    return module == package or module.startswith(f"{package}.")


def test_the_sources_are_found():
    assert {"schedule.py", "families/__init__.py", "toy/build.py"} <= TREES.keys()
    assert {"rapm", "rapm.schedule"} <= imported(
        ast.parse("def f():\n    from rapm import schedule\n")
    )


@pytest.mark.parametrize(("name", "own"), [("schedule", []), ("objective", ["rapm.schedule"])])
def test_the_method_knows_torch_alone(name, own):
    foreign = {
        m
        for m in imported(TREES[f"{name}.py"])
        if m.split(".")[0] not in {*sys.stdlib_module_names, "torch"}
    }
    assert [m for m in sorted(foreign) if not any(within(m, package) for package in own)] == []


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("network.py", ["rapm.config", "rapm.models"]),
        ("critic.py", ["rapm.config", "rapm.models"]),
        ("turns.py", ["rapm.models", "rapm.models.teacher", "rapm.train"]),
        ("train.py", ["rapm.models", "rapm.models.teacher"]),
        ("teacher.py", ["rapm.models.resolve", "rapm.train"]),
        *(
            (name, ["rapm.train", "rapm.models.teacher"])
            for name in TREES
            if name.startswith("families/")
        ),
        *((name, ["rapm.cli"]) for name in TREES if name != "__main__.py"),
    ],
)
def test_the_direction_of_imports(name, forbidden):
    assert [
        m for m in imported(TREES[name]) if any(within(m, package) for package in forbidden)
    ] == []


@pytest.mark.parametrize(
    ("package", "owner"),
    [("tomllib", "config.py"), ("tomli_w", "config.py"), ("peft", "network.py")],
)
def test_one_file_knows(package, owner):
    assert [
        name for name, tree in TREES.items() if any(within(m, package) for m in imported(tree))
    ] == [owner]


def calls(tree):
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_but_the_command_line_prints():
    assert [
        name for name, tree in TREES.items() if "print" in calls(tree) and name not in PRINTING
    ] == []


def test_nothing_is_unpickled():
    unsafe = ("pickle", "dill", "joblib", "shelve", "marshal", "yaml", "torch.load")
    assert [
        n
        for n, tree in TREES.items()
        if any(within(m, package) for m in imported(tree) for package in unsafe)
    ] == []
    assert [
        n for n, tree in TREES.items() if {"torch.load", "eval", "exec"} & set(calls(tree))
    ] == []
    keywords = {
        (n, node.arg)
        for n, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
    }
    assert [k for k in keywords if k[1] in ("allow_pickle", "trust_remote_code")] == []


def test_the_public_names():
    assert rapm.__all__ == sorted(rapm.__all__)
    assert len(rapm.__all__) <= 12
    assert [name for name in rapm.__all__ if not callable(getattr(rapm, name))] == []
    with pytest.raises(AttributeError, match="module 'rapm' has no attribute 'torch'"):
        _ = rapm.torch

"""A file is complete or absent, and comes back as it was written."""

import hashlib

import pytest
import torch

from rapm.io import (
    complete_or_absent,
    complete_or_absent_folder,
    load_metadata,
    load_tensors,
    save_tensors,
    sha256,
    under_prefix,
    with_prefix,
    write_json,
    write_text,
)


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_complete_file_replaces_the_older_one(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    write_text(file, "old")
    with complete_or_absent(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert contents(file.parent) == {"a.txt": "new"}


@pytest.mark.parametrize("before", [{}, {"a.txt": "old and whole"}], ids=["absent", "older"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), KeyboardInterrupt()],
    ids=["full", "interrupt"],
)
def test_a_failure_leaves_what_was_there(tmp_path, before, error):
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(type(error)), complete_or_absent(tmp_path / "a.txt") as temporary:
        temporary.write_text("half a fi")
        raise error
    assert contents(tmp_path) == before


def test_a_failure_before_the_first_byte(tmp_path):
    with pytest.raises(ZeroDivisionError), complete_or_absent(tmp_path / "a.txt"):
        _ = 1 / 0
    assert contents(tmp_path) == {}


def test_json_keeps_every_letter(tmp_path):
    write_json(tmp_path / "a.json", {"prompt": "élan"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "prompt": "élan"\n}\n'


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [{}, {"a": "old"}], ids=["absent", "older"])
def test_a_folder_is_complete_or_as_it_was(tmp_path, before, error):
    folder = tmp_path / "folder"
    if before:
        folder.mkdir()
        (folder / "a").write_text("old")
    with pytest.raises(type(error)), complete_or_absent_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["folder"] * bool(before)
    assert not before or contents(folder) == before
    with complete_or_absent_folder(folder) as temporary:
        (temporary / "b").write_text("new")
    assert contents(folder) == {"b": "new"}
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_tensor_file_has_the_permissions_of_any_new_file(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"step": "7"})
    (tmp_path / "plain").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("a.safetensors", "plain")}
    assert len(modes) == 1
    assert load_metadata(tmp_path / "a.safetensors") == {"step": "7"}


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"rapm" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"rapm" * 100_000).hexdigest()


def test_tensors_round_trip(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "b": torch.randn(5).bfloat16().requires_grad_(),
        "c": torch.tensor(7),
    }
    save_tensors(tmp_path / "a.safetensors", tensors, {"step": "7"})
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert {name: value.dtype for name, value in loaded.items()} == {
        name: value.dtype for name, value in tensors.items()
    }
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_prefixes():
    assert with_prefix("student", {"a.b": 1}) == {"student.a.b": 1}
    assert under_prefix("student", {"student.a.b": 1, "student2.a": 2, "a.student.b": 3}) == {
        "a.b": 1
    }

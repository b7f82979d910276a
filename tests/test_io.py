"""A file is complete or absent, and comes back as it was written."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from rapm import io
from rapm.errors import UserError
from rapm.io import (
    append_line,
    complete_or_absent,
    files_together,
    load_checked,
    load_made,
    load_metadata,
    load_tensors,
    read,
    save_checked,
    save_tensors,
    sha256,
    sweep,
    under_prefix,
    with_prefix,
    write_json,
    write_text,
)
from rapm.pictures import save


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
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("before", [{}, {"a": "old", "mine": "a user's"}], ids=["absent", "older"])
def test_files_come_together_or_not_at_all(tmp_path, before, linked, error):
    """What else is in the folder stays, and a link stays one."""
    folder = place = tmp_path / "folder"
    if linked:
        place = tmp_path / "elsewhere"
        place.mkdir()
        folder.symlink_to(place)
    for name, text in before.items():
        write_text(place / name, text)
    with pytest.raises(type(error)), files_together(folder) as temporary:
        (temporary / "a").write_text("half")
        raise error
    assert not before or contents(place) == before
    with files_together(folder) as temporary:
        (temporary / "a").write_text("new")
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_text("too")
    assert contents(place / "b") == {"c": "too"}
    (place / "b" / "c").unlink()
    (place / "b").rmdir()
    assert contents(place) == {**before, "a": "new"}
    assert folder.is_symlink() == linked


def test_a_tensor_file_has_the_permissions_of_any_new_file(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"step": "7"})
    (tmp_path / "plain").write_text("")
    modes = {(tmp_path / name).stat().st_mode for name in ("a.safetensors", "plain")}
    assert len(modes) == 1
    assert load_metadata(tmp_path / "a.safetensors") == {"step": "7"}


def test_a_file_and_its_name_are_on_the_disk_before_and_after_it_is_renamed(tmp_path, monkeypatch):
    """Else a power cut leaves an empty file under the name of a whole one."""
    did = []
    replace = Path.replace

    def renamed(self, target):
        did.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(io, "sync", lambda path: did.append(f"sync {path.name}"))
    monkeypatch.setattr(Path, "replace", renamed)
    (tmp_path / "x").mkdir()
    write_text(tmp_path / "x" / "a", "")
    assert did == [f"sync .a.{os.getpid()}.partial", "rename a", "sync x"]
    did.clear()
    with files_together(tmp_path / "x") as folder:
        (folder / "b").write_text("")
        (folder / "c").mkdir()
        (folder / "c" / "d").write_text("")
    assert did[:4] == ["sync b", "sync d", "rename b", "rename d"]
    assert {*did[4:]} == {"sync c", "sync x"}


def test_what_cannot_be_written_is_told_with_its_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for write in (
        lambda: write_text(tmp_path / "file" / "a", ""),
        lambda: save_tensors(tmp_path / "file" / "a", {}),
        lambda: append_line(tmp_path / "file" / "a", ""),
        lambda: files_together(tmp_path / "file" / "a").__enter__(),
        lambda: save(Image.new("RGB", (1, 1)), tmp_path / "file" / "a"),
    ):
        with pytest.raises(io.NotWritten, match=r"/file/a could not be written: \[Errno (17|20)\]"):
            write()


def test_a_sweep_takes_what_killed_writes_left(tmp_path):
    for name in (".x.partial/a", "y/a", ".tmpAbC123"):
        write_text(tmp_path / name, name)
    for name in (".tmp", ".tmpAbC1234", "a.partial", ".partial", ".lock"):
        write_text(tmp_path / name, "")
    sweep(tmp_path)
    sweep(tmp_path / "none")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *(".lock", ".partial", ".tmp", ".tmpAbC1234", "a.partial", "y")
    ]
    assert contents(tmp_path / "y") == {"a": "y/a"}


def test_what_cannot_be_read_is_not_called_absent(tmp_path, monkeypatch):
    with pytest.raises(io.NoFile, match=f"there is no file {tmp_path}/a"):
        read(tmp_path / "a")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"^{path} is no file$"):
            read(path)
    write_text(tmp_path / "a", "é")
    assert read(tmp_path / "a") == "é".encode()
    save_checked(tmp_path / "b", {}, {})

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    monkeypatch.setattr(Path, "read_bytes", denied)
    for call, name in ((read, "a"), (load_made, "b"), (load_checked, "b")):
        with pytest.raises(UserError) as caught:
            call(tmp_path / name)
        assert str(caught.value) == f"{tmp_path / name} cannot be read: Permission denied"
        assert not isinstance(caught.value, io.NoFile)


def test_checked_tensors_round_trip_and_equal_ones_are_equal_files(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(5).bfloat16(), "c": torch.tensor(7)}
    tensors |= {"d": torch.empty(0, 2), "e": torch.tensor([True, False])}
    made = {"step": 7, "facts": {"x": [1, "é"], "a": None}}
    for name, given in (("a", tensors), ("b", dict(reversed(tensors.items())))):
        save_checked(tmp_path / name, given, made)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    told, loaded = load_checked(tmp_path / "a")
    assert told == made
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_any_damaged_byte_of_a_checked_file_is_told(tmp_path):
    """Every single one of the header's and the values'."""
    file = tmp_path / "a"
    save_checked(file, {"a": torch.arange(3.0), "b": torch.arange(2)}, {"step": 7})
    whole = file.read_bytes()
    silent = []
    for place in range(len(whole)):
        for flip in (1, 32, 128):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                load_checked(file)
                silent.append(whole[place : place + 1])
            except io.Damaged as error:
                assert "\n" not in str(error)
    assert silent == []


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

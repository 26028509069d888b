"""files.py: a file is written completely or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from agentsd.files import write_atomically


def test_text_bytes_and_a_function(tmp_path):
    path = tmp_path / "a"
    write_atomically(str(path), "斑马\n")
    assert path.read_bytes() == "斑马\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    write_atomically(path, lambda file: file.write(b"three"))
    assert path.read_bytes() == b"three" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_fails_on_the_way_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a"
    write_atomically(path, "before")

    def fail(file):
        file.write(b"half")
        file.flush()
        assert path.read_text() == "before"
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_missing_folder_and_the_longest_name(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "a", "")
    write_atomically(tmp_path / ("x" * 255), "")
    assert os.listdir(tmp_path) == ["x" * 255]


def test_nothing_but_the_standard_library_is_imported():
    code = "import sys, agentsd.files; assert not {'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Files that are whole or absent."""

import os

import pytest

from data.files import atomic_write


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, b"old content"])
def test_a_failed_write_leaves_what_was_there(tmp_path, error, old):
    """The old content or no file, and no temporary file, also on Ctrl-C."""
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new content")
        file.flush()
        raise error
    assert {child.name: child.read_bytes() for child in tmp_path.iterdir()} == ({} if old is None else {"file": old})


def test_links_and_pipes_stay_what_they_are(tmp_path):
    """What a link points to is replaced; what is no file is written to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        with atomic_write(tmp_path / name) as file:
            file.write(b"content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == b"content"
    assert os.read(reader, 99) == b"content" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert sorted(child.name for child in tmp_path.rglob("*")) == ["disk", "file", "link", "pipe"]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path):
    """A folder is where the file should go."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError), atomic_write(tmp_path / "taken") as file:
        file.write(b"content")
    assert [child.name for child in tmp_path.iterdir()] == ["taken"]


def test_readers_see_the_old_content_until_the_end(tmp_path):
    """Then the new, whole; text modes are open()'s."""
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, "w", encoding="latin1", newline="\r\n") as file:
        file.write("größe\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "größe\r\n".encode("latin1")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_bits_follow_the_umask(tmp_path, umask):
    """As of any file that open() makes, not those of a private temporary file; the umask stays what it was."""
    previous = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"content")
        (tmp_path / "other").write_bytes(b"content")
    finally:
        left = os.umask(previous)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert left == umask

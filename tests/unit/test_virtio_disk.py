"""Disk options, and every file that cannot be a disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import tasks, wait_for
from vmm.devices.virtio.blk import Blk, parse_disk
from vmm.errors import ConfigError, HostError
from vmm.memory import GuestMemory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.mark.parametrize(
    ("text", "path", "readonly", "serial", "direct"),
    [
        ("a.img", "a.img", False, "", False),
        ("a.img,ro", "a.img", True, "", False),
        ("a.img,serial=X-1,direct", "a.img", False, "X-1", True),
        ("a.img,direct,ro,serial=s p", "a.img", True, "s p", True),
        ("a,,b.img,serial=1,,2", "a,b.img", False, "1,2", False),
        ("ro", "ro", False, "", False),
        ("a.img,ro,rw", "a.img", False, "", False),
        ("a.img,serial=12345678901234567890", "a.img", False, "12345678901234567890", False),
    ],
)
def test_options(text: str, path: str, readonly: bool, serial: str, direct: bool) -> None:
    spec = parse_disk(text)
    assert (spec.path, spec.readonly, spec.serial, spec.direct) == (path, readonly, serial, direct)
    again = parse_disk(str(spec))
    assert str(again) == str(spec)
    assert again.path == path


@pytest.mark.parametrize(
    "text",
    [
        *("", ",ro", "a,", "a,readonly", "a,serial", "a,serial=", "a,serial=é", "a,ro=1"),
        *("a,b.img", "a,serial=" + "x" * 21, "a,serial=x\ny"),
    ],
)
def test_options_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_disk(text)
    assert "\n" not in str(e.value).replace(text, "")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(path: object, *, readonly: bool = False) -> str:
    before = open_fds()
    with pytest.raises(HostError) as e:
        Blk(str(path), readonly=readonly)
    assert open_fds() == before
    return str(e.value)


def test_files_that_are_no_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
    assert "No such file" in refused(tmp_path / "missing")
    assert "is a directory" in refused(tmp_path)
    assert "is a directory" in refused(tmp_path, readonly=True)
    assert "not a file or block device" in refused(tmp_path / "fifo")
    assert "not a file or block device" in refused(tmp_path / "fifo", readonly=True)
    assert "could not be opened" in refused(tmp_path / "socket")
    assert "not a file or block device" in refused("/dev/null")
    assert "is empty" in refused(tmp_path / "empty")
    assert str(tmp_path / "missing") in refused(tmp_path / "missing")


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_files_that_may_not_be_opened(image: Path) -> None:
    image.chmod(0o444)
    assert "append ',ro'" in refused(image)
    image.chmod(0)
    assert "Permission denied" in refused(image, readonly=True)


def test_a_disk_is_locked(image: Path) -> None:
    disk = Blk(str(image))
    assert "already in use by this process" in refused(image)
    assert "already in use" in refused(image, readonly=True)
    disk.close()
    first, second = Blk(str(image), readonly=True), Blk(str(image), readonly=True)
    assert "already in use" in refused(image)
    first.close()
    second.close()
    Blk(str(image)).close()


def test_the_holder_is_named(image: Path) -> None:
    code = (
        "import sys; from vmm.devices.virtio.blk import Blk; d = Blk(sys.argv[1]);"
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        assert f"by process {other.pid}" in refused(image)
        other.communicate(b"", timeout=10)
    Blk(str(image)).close()


def test_closing_gives_everything_back(image: Path) -> None:
    """At once: the next guest may have the disk as soon as this one is gone."""
    memory = GuestMemory([(0, 1 << 20)])
    before, threads = open_fds(), tasks()
    for turn in range(50):
        disk = Blk(str(image), direct=turn % 2 == 1)
        disk.attach(memory, None)
        disk.close()
    assert open_fds() == before
    wait_for(lambda: tasks() == threads)
    memory.close()

"""Disk options, and every file that cannot be a disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import tasks, wait_for
from vmm.devices.virtio.blk import Blk
from vmm.disk import DiskSpec, parse_disk
from vmm.errors import ConfigError, HostError
from vmm.memory import GuestMemory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ("a.img", "a.img", {}),
        ("a.img,ro", "a.img", {"read_only": True}),
        ("a.img,readonly=on", "a.img", {"read_only": True}),
        ("a.img,ro=off", "a.img", {}),
        ("a.img,serial=X-1,direct", "a.img", {"serial": "X-1", "cache": "none"}),
        ("a.img,cache=directsync,serial=s p", "a.img", {"cache": "directsync", "serial": "s p"}),
        ("a,,b.img,serial=1,,2", "a,b.img", {"serial": "1,2"}),
        ("ro", "ro", {}),
        ("serial=x", "serial=x", {}),
        ("a.img,serial=12345678901234567890", "a.img", {"serial": "12345678901234567890"}),
        ("a.img,queues=8,block-size=4096", "a.img", {"queues": 8, "block_size": 4096}),
        ("a.img,discard=off", "a.img", {"discard": False}),
        ("a.img,werror=stop,rerror=ignore", "a.img", {"werror": "pause", "rerror": "ignore"}),
        (
            "a.img,bps=10M,bps-burst=4096B,iops=500,iops-burst=9",
            "a.img",
            {"bps": 10 << 20, "bps_burst": 4096, "iops": 500, "iops_burst": 9},
        ),
    ],
)
def test_options(text: str, path: str, said: dict[str, object]) -> None:
    spec = parse_disk(text)
    assert spec.path == path
    assert spec == DiskSpec(path, **said)  # type: ignore[arg-type]
    assert spec.keywords() == {**DiskSpec(path).keywords(), **said}
    again = parse_disk(str(spec))
    assert again == spec
    assert again.path == path


@pytest.mark.parametrize(
    "text",
    [
        *("", ",ro", "a,", "a,serial", "a,serial=", "a,serial=é", "a,ro=1", "a,rw", "a,cache=x"),
        *("a,b.img", "a,serial=" + "x" * 21, "a,serial=x\0y", "a,queues=65", "a,queues=-1"),
        *("a,block-size=1024", "a,werror=panic", "a,rerror=enospc", "a,bps=1Q", "a,iops=1.5"),
        *("a,direct=on", "a,ro,ro", "a,path=b"),
    ],
)
def test_options_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_disk(text)
    assert "\n" not in str(e.value)
    assert "path=" not in str(e.value).replace(text, "")


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def refused(path: object, *, read_only: bool = False) -> str:
    before = open_fds()
    with pytest.raises(HostError) as e:
        Blk(str(path), read_only=read_only)
    assert open_fds() == before
    return str(e.value)


def test_files_that_are_no_disk(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
    assert "No such file" in refused(tmp_path / "missing")
    assert "is a directory" in refused(tmp_path)
    assert "is a directory" in refused(tmp_path, read_only=True)
    assert "not a file or block device" in refused(tmp_path / "fifo")
    assert "not a file or block device" in refused(tmp_path / "fifo", read_only=True)
    assert "could not be opened" in refused(tmp_path / "socket")
    assert "not a file or block device" in refused("/dev/null")
    assert "is empty" in refused(tmp_path / "empty")
    assert str(tmp_path / "missing") in refused(tmp_path / "missing")


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_files_that_may_not_be_opened(image: Path) -> None:
    image.chmod(0o444)
    assert "append ',ro'" in refused(image)
    image.chmod(0)
    assert "Permission denied" in refused(image, read_only=True)


def test_a_disk_is_locked(image: Path) -> None:
    disk = Blk(str(image))
    assert "already in use by this process" in refused(image)
    assert "already in use" in refused(image, read_only=True)
    disk.close()
    first, second = Blk(str(image), read_only=True), Blk(str(image), read_only=True)
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
        disk = Blk(str(image), cache="none" if turn % 2 else "writeback", queues=turn % 5)
        disk.attach(memory, None)
        disk.close()
    assert open_fds() == before
    wait_for(lambda: tasks() == threads)
    memory.close()

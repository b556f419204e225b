"""virtio-fs with requests that lie, and with more of everything than there is."""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import fs_fixtures
from tests.fuse_client import (
    BATCH_FORGET,
    FORGET,
    GETATTR,
    IN,
    INTERRUPT,
    LOOKUP,
    OUT,
    READDIR,
    ROOT,
    SETXATTR,
    WRITE,
    Client,
    fails,
    z,
)
from vmm.devices.virtio import fs as fs_module

client, fs, share = fs_fixtures.client, fs_fixtures.fs, fs_fixtures.share


# ---- requests that lie ------------------------------------------------------------------------


def test_every_operation_with_arguments_cut_short(fs: Client) -> None:
    """Answers come, whatever is missing, and the session goes on."""
    silent = (FORGET, BATCH_FORGET, INTERRUPT)
    for op in range(54):
        for size in (0, 1, 7, 8, 15, 16, 24, 39, 40, 56, 64):
            for room in (0, 1, 8, 4096):
                fs.rig.driver.next = fs.mark
                fs.queue.add([fs.message(op, ROOT, bytes(size))], [OUT.size + room])
                fs.queue.kick()
                _, length, _ = fs.queue.wait()
                assert length == 0 if op in silent else OUT.size <= length <= OUT.size + room
        if op == 38:
            fs.init()
    assert fs.lookup("file").attr.size == 20


@pytest.mark.parametrize("length", [0, 39, IN.size + 6, 1 << 31, 0xFFFF_FFFF])
def test_lengths_that_lie(fs: Client, length: int) -> None:
    assert fs.ask(LOOKUP, ROOT, b"file\0", 300, length=length)[0] == errno.EINVAL
    assert fs.lookup("file").attr.size == 20


def test_sizes_that_lie(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    fh = fs.open(node, os.O_RDWR)
    body = struct.pack("<QQIIQII", fh, 0, 100, 0, 0, 0, 0) + b"short"
    with fails(errno.EINVAL):
        fs.call(WRITE, node, body, 8)
    with fails(errno.EINVAL):
        fs.call(SETXATTR, node, struct.pack("<II", 100, 0) + z("user.x") + b"short")
    # More is asked for than there is room.
    body = struct.pack("<QQIIQII", fh, 0, 0xFFFF_FFFF, 0, 0, 0, 0)
    assert fs.call(15, node, body, 7) == b"what th"
    for offset in (1 << 63, (1 << 64) - 1):
        with fails(errno.EINVAL):
            fs.read(fh, offset)
        with fails(errno.EFBIG):
            fs.write(fh, b"x", offset)
    with fails(errno.EFBIG):
        fs.setattr(node, 8, size=1 << 63)
    assert (share / "file").read_bytes() == b"what the host wrote\n"


def test_chains_without_a_request(client: Client) -> None:
    for readable, writable in (
        ([b"x" * 39], [OUT.size]),
        ([client.message(LOOKUP, ROOT, b"file\0")], [OUT.size - 1]),
        ([client.message(GETATTR, ROOT, bytes(16))], []),
    ):
        client.queue.add(readable, writable)
        client.queue.kick()
        client.rig.until_broken()
        client.rig.driver.reset()
        client.start()
        assert client.lookup("file").attr.size == 20


def test_numbers_that_were_not_given(fs: Client) -> None:
    node = fs.walk("file")
    fh = fs.open(node)
    for bad in (0, 3, 1 << 32 | node, node | 1 << 63, (1 << 64) - 1, 1 << 32 | ROOT):
        with fails(errno.ENOENT):
            fs.getattr(bad)
        with fails(errno.ENOENT):
            fs.lookup("file", bad)
        with fails(errno.ENOENT):
            fs.rename("file", "x", to=bad)
        fs.forget(bad, 1 << 60)
    for bad in (0, fh + 1, 1 << 32 | fh, (1 << 64) - 1):
        with fails(errno.EBADF):
            fs.read(bad)
    with fails(errno.ENOTDIR):
        fs.lookup("x", node)
    with fails(errno.ENOTDIR):
        fs.create("x", node=node)
    fs.forget(ROOT, 1 << 60)
    assert fs.getattr(ROOT).kind == stat.S_IFDIR
    fs.release(fh)
    with fails(errno.EBADF):
        fs.release(fh)


def test_offsets_that_no_entry_has(fs: Client) -> None:
    fh = fs.opendir()
    for offset in (7, 1 << 62, (1 << 64) - 1):
        fs.ask(READDIR, ROOT, struct.pack("<QQIIQII", fh, offset, 4096, 0, 0, 0, 0), 4096)
    assert len(fs.readdir_at(fh, 0)) == 5


# ---- more than there is -------------------------------------------------------------------------


@pytest.fixture
def few(share: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A share that may use 64 descriptors: 16 handles, and 32 for what is only known."""
    monkeypatch.setattr(fs_module, "_descriptors", lambda: 64)
    client = Client(share)
    yield client
    client.close()


def test_more_directories_than_descriptors(few: Client, share: Path) -> None:
    nodes = {}
    for i in range(200):
        deep = share / f"d{i}" / "a" / "b"
        deep.mkdir(parents=True)
        (deep / "f").write_text(str(i))
        nodes[i] = few.walk(f"d{i}/a/b/f")
    assert few.fs.stats()["inodes"] > 800
    assert few.fs.stats()["fds"] <= 34
    for i, node in nodes.items():
        fh = few.open(node)
        assert few.read(fh) == str(i).encode()
        few.release(fh)
    # Renamed by the guest, a file is found again, below a directory without a descriptor too.
    few.rename("d0", "e0")
    for i in range(1, 100):
        few.listdir(few.walk(f"d{i}/a"))
    assert few.getattr(nodes[0]).size == 1
    # By the host, it is not, until the guest looks it up.
    os.rename(share / "d1", share / "e1")
    for i in range(2, 100):
        few.listdir(few.walk(f"d{i}/a"))
    with fails(errno.ESTALE):
        few.open(nodes[1])
    assert few.walk("e1/a/b/f") == nodes[1]
    assert few.read(few.open(nodes[1])) == b"1"


def test_more_open_files_than_descriptors(few: Client, share: Path) -> None:
    node = few.walk("file")
    handles = [few.open(node) for _ in range(16)]
    with fails(errno.ENFILE):
        few.open(node)
    with fails(errno.ENFILE):
        few.create("new")
    for fh in handles:
        few.release(fh)
    assert few.read(few.open(node)) == b"what the host wrote\n"


def test_unlinked_files_without_end(few: Client, share: Path) -> None:
    """A guest that keeps what it removes gets no more of it than there is room for."""
    nodes = [few.mknod(f"f{i}", stat.S_IFREG | 0o644).nodeid for i in range(100)]
    for i in range(100):
        few.unlink(f"f{i}")
    assert few.fs.stats()["fds"] <= 40
    kept = 0
    for node in nodes:
        with suppress(OSError):
            kept += few.getattr(node).nlink == 0
    assert 10 < kept < 40
    assert few.read(few.open(few.walk("file"))) == b"what the host wrote\n"


def test_the_process_has_no_descriptors_left(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        handles = []
        with fails(errno.ENFILE):
            while True:
                handles.append(fs.open(node))
        assert handles
        with fails(errno.ENFILE):
            fs.create("new")
        for fh in handles:
            fs.release(fh)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert fs.read(fs.open(node)) == b"what the host wrote\n"


def test_many_requests_at_once(client: Client) -> None:
    """More than there are workers; each is answered once."""
    _, fh = client.create("new")
    client.rig.driver.next = client.mark
    body = struct.pack("<QQIIQII", fh, 0, 4, 0, 0, 0, 0) + b"data"
    sent = {client.send(WRITE, ROOT, body, 8) for _ in range(30)}
    assert {client.receive()[:2] for _ in range(30)} == {(unique, 0) for unique in sent}


def test_a_reset_with_requests_in_flight(client: Client) -> None:
    for _ in range(20):
        _, fh = client.create("new", flags=os.O_RDWR)
        client.rig.driver.next = client.mark
        body = struct.pack("<QQIIQII", fh, 0, 4096, 0, 0, 0, 0) + bytes(4096)
        for _ in range(16):
            client.send(WRITE, ROOT, body, 8)
        client.rig.driver.reset()
        assert client.fs.stats()["handles"] == 0
        client.start()

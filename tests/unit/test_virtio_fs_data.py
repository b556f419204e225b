"""virtio-fs: what is in files and directories, and the modes of a share."""

from __future__ import annotations

import errno
import os
import stat
import struct
from itertools import pairwise
from pathlib import Path

import pytest

from tests import fs_fixtures
from tests.fuse_client import (
    ACCESS,
    COPY_FILE_RANGE,
    DIRECT_IO,
    EXCHANGE,
    FALLOCATE,
    FLUSH,
    FSYNC,
    FSYNCDIR,
    GETXATTR,
    IOCTL,
    KEEP_CACHE,
    LISTXATTR,
    LSEEK,
    MODE,
    READDIR,
    REMOVEXATTR,
    ROOT,
    SETXATTR,
    SYNCFS,
    Client,
    fails,
    z,
)

client, fs, share = fs_fixtures.client, fs_fixtures.fs, fs_fixtures.share


def test_big_requests_in_many_parts(fs: Client, share: Path) -> None:
    data = os.urandom(256 * 1024)
    _, fh = fs.create("big")
    fs.rig.driver.next = fs.mark
    body = struct.pack("<QQIIQII", fh, 0, len(data), 0, 0, 0, 0)
    message = fs.message(16, ROOT, body + data)
    cuts = [0, 1, 41, 80, 81, 5000, *range(9096, len(message), 65536), len(message)]
    parts = [message[a:b] for a, b in pairwise(cuts)]
    length, answer = fs.queue.request(parts, [3, 4, 17])
    assert length == 24
    assert struct.unpack("<I", answer[16:20])[0] == len(data)
    assert (share / "big").read_bytes() == data
    fs.rig.driver.next = fs.mark
    message = fs.message(15, ROOT, struct.pack("<QQIIQII", fh, 1, 200_000, 0, 0, 0, 0))
    length, answer = fs.queue.request([message[:7], message[7:]], [1, 15, 1, 4096, 300_000])
    assert length == 200_016
    assert answer[16:] == data[1:200_001]


def test_a_listing_in_small_parts(fs: Client, share: Path) -> None:
    names = {b"n" * (1 + i % 200) + str(i).encode() for i in range(300)}
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(share), b"dir", name))).touch()
    names.add(b"inner")
    node = fs.walk("dir")
    for room in (300, 1000, 8192, 100_000):
        got = fs.listdir(node, room)
        assert len(got) == len(names)
        assert set(got) == names
    fh = fs.opendir(node)
    # No room for even one: nothing, and nothing is lost.
    assert fs.readdir_at(fh, 0, node, 16) == []
    first = fs.readdir_at(fh, 0, node, 1000)
    assert fs.readdir_at(fh, 0, node, 1000) == first
    assert fs.readdir_at(fh, first[2][2], node, 1000)[0] == first[3]


def test_readdirplus(fs: Client, share: Path) -> None:
    fh = fs.opendir()
    got = {name: entry for name, entry, _ in fs.readdirplus_at(fh, 0)}
    assert got[b"."].nodeid == got[b".."].nodeid == 0
    assert got[b"file"].attr.size == 20
    assert got[b"file"].nodeid == fs.walk("file")
    assert got[b"link"].attr.kind == stat.S_IFLNK
    assert fs.fs.stats()["inodes"] == 4
    for name in (b"file", b"link", b"dir"):
        fs.forget(got[name].nodeid, 2)
    assert fs.fs.stats()["inodes"] == 1


def test_above_the_root_is_the_root(fs: Client, share: Path) -> None:
    names = {name: ino for name, ino, _, _ in fs.readdir_at(fs.opendir(), 0)}
    assert names[b"."] == names[b".."] == share.stat().st_ino


def test_holes_and_ranges(fs: Client, share: Path) -> None:
    made, fh = fs.create("holes")
    fs.write(fh, b"x" * 4096, 1 << 20)
    assert fs.call(FALLOCATE, made.nodeid, struct.pack("<QQQII", fh, 0, 4096, 1, 0)) == b""
    size = struct.unpack("<Q", fs.call(LSEEK, made.nodeid, struct.pack("<QQII", fh, 0, 4, 0), 8))
    assert size[0] <= 1 << 20
    with fails(errno.EINVAL):
        fs.call(LSEEK, made.nodeid, struct.pack("<QQII", fh, 0, 2, 0), 8)
    other, to = fs.create("copy")
    body = struct.pack("<QQQQQQQ", fh, 1 << 20, other.nodeid, to, 3, 100, 0)
    out = fs.call(COPY_FILE_RANGE, made.nodeid, body, 8)
    assert struct.unpack("<II", out)[0] == 100
    assert (share / "copy").read_bytes() == bytes(3) + b"x" * 100


def test_syncs(fs: Client) -> None:
    _, fh = fs.create("new")
    assert fs.call(FSYNC, ROOT, struct.pack("<QII", fh, 0, 0)) == b""
    assert fs.call(FSYNC, ROOT, struct.pack("<QII", fh, 1, 0)) == b""
    assert fs.call(FSYNCDIR, ROOT, struct.pack("<QII", fs.opendir(), 0, 0)) == b""
    assert fs.call(SYNCFS, ROOT, bytes(8)) == b""
    with fails(errno.EBADF):
        fs.call(FSYNCDIR, ROOT, struct.pack("<QII", fh, 0, 0))


def test_extended_attributes(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    value = os.urandom(300)
    set_ = struct.pack("<II", len(value), 0) + z("user.x") + value
    assert fs.ask(SETXATTR, node, set_) == (0, b"")
    assert os.getxattr(share / "file", "user.x") == value
    size = struct.pack("<II", 0, 0)
    assert struct.unpack("<II", fs.call(GETXATTR, node, size + z("user.x"), 8))[0] == 300
    room = struct.pack("<II", 1000, 0)
    assert fs.call(GETXATTR, node, room + z("user.x"), 1000) == value
    assert fs.call(LISTXATTR, node, room, 1000) == b"user.x\0"
    assert struct.unpack("<II", fs.call(LISTXATTR, node, size, 8))[0] == 7
    with fails(errno.ERANGE):
        fs.call(GETXATTR, node, struct.pack("<II", 10, 0) + z("user.x"), 10)
    with fails(errno.EEXIST):
        fs.call(SETXATTR, node, struct.pack("<II", 1, 1) + z("user.x") + b"y")
    fs.call(REMOVEXATTR, node, z("user.x"))
    with fails(errno.ENODATA):
        fs.call(GETXATTR, node, room + z("user.x"), 1000)
    for name in ("security.capability", "trusted.x", "system.posix_acl_access", "user."):
        with fails(errno.EOPNOTSUPP):
            fs.call(SETXATTR, node, struct.pack("<II", 1, 0) + z(name) + b"y")
        with fails(errno.EOPNOTSUPP):
            fs.call(REMOVEXATTR, node, z(name))


def test_what_is_left_to_the_guest(fs: Client) -> None:
    node = fs.walk("file")
    fh = fs.open(node)
    for op, body in (
        (ACCESS, bytes(8)),
        (IOCTL, bytes(32)),
        (FLUSH, struct.pack("<QIIQ", fh, 0, 0, 0)),
        (48, bytes(64)),
        (4096, b""),
        (0, b""),
        (0xFFFF_FFFF, b""),
    ):
        with fails(errno.ENOSYS):
            fs.call(op, node, body, 64)


def test_read_only(share: Path) -> None:
    fs = Client(share, ro=True)
    node = fs.walk("file")
    before = (share / "file").stat()
    for ask in (
        lambda: fs.create("new"),
        lambda: fs.tmpfile(),
        lambda: fs.mkdir("new"),
        lambda: fs.mknod("new", stat.S_IFREG),
        lambda: fs.symlink("new", "x"),
        lambda: fs.link(node, "new"),
        lambda: fs.unlink("file"),
        lambda: fs.rmdir("dir"),
        lambda: fs.rename("file", "new"),
        lambda: fs.rename("file", "dir", flags=EXCHANGE),
        lambda: fs.setattr(node, MODE, mode=0),
        lambda: fs.open(node, os.O_WRONLY),
        lambda: fs.open(node, os.O_RDWR),
        lambda: fs.open(node, os.O_RDONLY | os.O_TRUNC),
        lambda: fs.call(SETXATTR, node, struct.pack("<II", 0, 0) + z("user.x")),
        lambda: fs.call(REMOVEXATTR, node, z("user.x")),
        lambda: fs.call(FALLOCATE, node, bytes(32)),
        lambda: fs.call(COPY_FILE_RANGE, node, bytes(56), 8),
        lambda: fs.write(fs.open(node), b"x"),
    ):
        with fails(errno.EROFS):
            ask()
    assert fs.read(fs.open(node)) == b"what the host wrote\n"
    assert (share / "file").stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(p.name for p in share.iterdir()) == ["dir", "file", "link"]
    fs.close()


@pytest.mark.parametrize(("cache", "seconds", "first"), [
    ("auto", 1, 0), ("always", 86400, KEEP_CACHE), ("never", 0, DIRECT_IO),
])  # fmt: skip
def test_cache_modes(share: Path, cache: str, seconds: int, first: int) -> None:
    fs = Client(share, cache=cache)
    entry = fs.lookup("file")
    assert entry.entry_valid == entry.attr_valid == seconds
    assert fs.open_flags(entry.nodeid)[1] == first
    if cache == "always":
        assert fs.lookup("missing").nodeid == 0
    else:
        with fails(errno.ENOENT):
            fs.lookup("missing")
    fs.close()


def test_contents_are_kept_until_they_change(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    assert fs.open_flags(node)[1] == 0
    assert fs.open_flags(node)[1] == KEEP_CACHE
    (share / "file").write_bytes(b"others")
    assert fs.open_flags(node)[1] == 0
    assert fs.open_flags(node)[1] == KEEP_CACHE


def test_writeback_opens_for_both(share: Path) -> None:
    fs = Client(share, writeback=True)
    assert fs.flags & 1 << 16
    fh = fs.open(fs.walk("file"), os.O_WRONLY | os.O_APPEND)
    assert fs.read(fh) == b"what the host wrote\n"
    assert fs.write(fh, b"THAT", 0) == 4
    assert (share / "file").read_bytes() == b"THAT the host wrote\n"
    fs.close()


def test_a_reset_forgets_everything(client: Client, share: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    fh = client.open(client.walk("file"))
    client.opendir(client.walk("dir"))
    assert client.fs.stats()["handles"] == 2
    client.rig.driver.reset()
    stats = client.fs.stats()
    assert (stats["inodes"], stats["handles"], stats["fds"]) == (1, 0, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    client.start()
    with fails(errno.EBADF):
        client.read(fh)
    assert client.read(client.open(client.walk("file"))) == b"what the host wrote\n"


def test_a_wrong_directory_handle(fs: Client) -> None:
    fh = fs.opendir(fs.walk("dir"))
    with fails(errno.EBADF):
        fs.call(READDIR, ROOT, struct.pack("<QQIIQII", fh, 0, 4096, 0, 0, 0, 0), 4096)
    with fails(errno.EBADF):
        fs.read(fh)

"""virtio-fs: names, files and their attributes, as a guest that behaves asks for them.
virtio-v1.3 §5.11; FUSE by tests/fuse_client.py."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

from tests import fs_fixtures
from tests.fuse_client import (
    ATIME,
    BATCH_FORGET,
    DESTROY,
    EXCHANGE,
    MODE,
    MTIME,
    MTIME_NOW,
    NOREPLACE,
    ROOT,
    SIZE,
    STATFS,
    Client,
    fails,
)

client, fs, share = fs_fixtures.client, fs_fixtures.fs, fs_fixtures.share


def test_what_the_driver_sees(client: Client) -> None:
    assert client.rig.regs.device_id() == 26
    tag = bytes(client.rig.regs.config(i, 1) for i in range(36))
    assert tag == b"fs0".ljust(36, b"\0")
    assert client.rig.regs.config(36, 4) == 1
    assert client.fs.unclaimed() is None


def test_a_session(client: Client, share: Path) -> None:
    entry = client.lookup("file")
    assert entry.attr.size == 20
    assert entry.attr.ino == (share / "file").stat().st_ino
    fh = client.open(entry.nodeid)
    assert client.read(fh) == b"what the host wrote\n"
    assert client.read(fh, 5, 3) == b"the"
    assert client.read(fh, 20) == b""
    client.release(fh)
    made, fh = client.create("new")
    assert client.write(fh, b"from the guest") == 14
    assert client.write(fh, b"FROM", 0) == 4
    client.release(fh)
    assert (share / "new").read_bytes() == b"FROM the guest"
    assert client.getattr(made.nodeid).size == 14
    assert sorted(client.listdir()) == [b"dir", b"file", b"link", b"new"]
    client.rename("new", "newer", to=client.walk("dir"))
    assert (share / "dir" / "newer").read_bytes() == b"FROM the guest"
    client.unlink("newer", client.walk("dir"))
    client.unlink("inner", client.walk("dir"))
    client.rmdir("dir")
    assert sorted(p.name for p in share.iterdir()) == ["file", "link"]


def test_packed_queues(share: Path) -> None:
    client = Client(share, packed=True)
    assert client.read(client.open(client.walk("file"))) == b"what the host wrote\n"
    client.close()


def test_init(fs: Client) -> None:
    major, minor, readahead, flags, _, _, max_write, gran, pages, _, flags2 = fs.init()
    assert (major, minor) == (7, 36)
    assert readahead == 1 << 17
    assert (max_write, gran, pages, flags2) == (1 << 20, 1, 256, 0)
    assert flags & 1 << 22
    assert not flags & (1 << 1 | 1 << 16)
    assert fs.init(flags=0)[3] == 0
    assert fs.init(minor=31)[0] == 7
    with fails(errno.EPROTO):
        fs.init(minor=30)


def test_nothing_before_init(share: Path) -> None:
    client = Client(share, init=False)
    with fails(errno.EIO):
        client.lookup("file")
    client.init()
    client.lookup("file")
    client.call(DESTROY, 0)
    with fails(errno.EIO):
        client.lookup("file")
    client.close()


def test_the_same_file_has_the_same_number(fs: Client, share: Path) -> None:
    os.link(share / "file", share / "dir" / "other")
    one, other = fs.lookup("file"), fs.lookup("other", fs.walk("dir"))
    assert one.nodeid == other.nodeid
    assert one.attr.nlink == 2
    fs.forget(one.nodeid)
    assert fs.getattr(one.nodeid).size == 20
    fs.forget(one.nodeid)
    with fails(errno.ENOENT):
        fs.getattr(one.nodeid)


def test_forgotten_numbers_mean_nothing(fs: Client) -> None:
    node = fs.walk("file")
    fs.forget(node, 1)
    again = fs.walk("file")
    assert again != node
    with fails(errno.ENOENT):
        fs.getattr(node)
    body = struct.pack("<II", 2, 0) + struct.pack("<QQQQ", again, 1 << 40, ROOT, 7)
    fs.silent(BATCH_FORGET, 0, body)
    with fails(errno.ENOENT):
        fs.getattr(again)
    assert fs.getattr(ROOT).kind == stat.S_IFDIR
    assert fs.fs.stats()["inodes"] == 1


def test_a_directory_waits_for_its_children(fs: Client) -> None:
    node = fs.walk("dir")
    inner = fs.walk("inner", node)
    fs.forget(node, 1)
    assert fs.getattr(inner).size == 5
    fs.forget(inner)
    assert fs.fs.stats()["inodes"] == 1


def test_attributes(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    assert stat.S_IMODE(fs.setattr(node, MODE, mode=0o600).mode) == 0o600
    assert fs.setattr(node, SIZE, size=5).size == 5
    assert (share / "file").read_bytes() == b"what "
    assert fs.setattr(node, SIZE, size=8).size == 8
    attr = fs.setattr(node, ATIME | MTIME, atime=10, mtime=20, atimensec=999_999_999, mtimensec=7)
    assert (attr.atime, attr.atimensec, attr.mtime, attr.mtimensec) == (10, 999_999_999, 20, 7)
    assert fs.setattr(node, MTIME_NOW).mtime > 1_000_000_000
    link = fs.walk("link")
    assert fs.setattr(link, MTIME, mtime=5).mtime == 5
    assert os.lstat(share / "link").st_mtime == 5
    with fails(errno.EOPNOTSUPP):
        fs.setattr(link, MODE, mode=0o777)
    with fails(errno.EISDIR):
        fs.setattr(fs.walk("dir"), SIZE, size=0)
    assert fs.call(STATFS, ROOT, b"", 80)


def test_symbolic_links_are_text(fs: Client, share: Path) -> None:
    assert fs.readlink(fs.walk("link")) == b"file"
    made = fs.symlink("out", "/etc/passwd")
    assert made.attr.kind == stat.S_IFLNK
    assert fs.readlink(made.nodeid) == b"/etc/passwd"
    with fails(errno.ELOOP):
        fs.open(made.nodeid)
    long = b"x" * 4095
    assert fs.readlink(fs.symlink("long", long).nodeid) == long
    with fails(errno.EINVAL):
        fs.readlink(fs.walk("file"))
    with fails(errno.ENOTDIR):
        fs.lookup("passwd", made.nodeid)


def test_nodes(fs: Client, share: Path) -> None:
    for name, kind in (("f", stat.S_IFREG), ("p", stat.S_IFIFO), ("s", stat.S_IFSOCK)):
        made = fs.mknod(name, kind | 0o666)
        assert made.attr.mode == kind | 0o666
        assert os.lstat(share / name).st_mode == kind | 0o666
        if kind != stat.S_IFREG:
            with fails(errno.ENXIO):
                fs.open(made.nodeid)
    for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR, stat.S_IFLNK, 0):
        with fails(errno.EPERM):
            fs.mknod("node", kind | 0o666, rdev=0x103)
    assert not (share / "node").exists()


def test_modes_are_the_guests(fs: Client, share: Path) -> None:
    """Whatever this process's umask is: the guest's kernel has applied that of its own."""
    old = os.umask(0o077)
    try:
        assert fs.mkdir("wide", 0o1777).attr.mode == stat.S_IFDIR | 0o1777
        made, _ = fs.create("open", 0o666)
        assert made.attr.mode == stat.S_IFREG | 0o666
    finally:
        os.umask(old)


def test_hard_links(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    assert fs.link(node, "second").nodeid == node
    link = fs.walk("link")
    assert fs.link(link, "link2").attr.kind == stat.S_IFLNK
    assert os.readlink(share / "link2") == "file"
    with fails(errno.EEXIST):
        fs.link(node, "second")
    fs.unlink("file")
    assert fs.getattr(node).nlink == 1
    assert fs.read(fs.open(node)) == b"what the host wrote\n"


def test_create_opens_what_is_there(fs: Client, share: Path) -> None:
    made, fh = fs.create("file", flags=os.O_RDWR)
    assert fs.read(fh) == b"what the host wrote\n"
    assert made.nodeid == fs.walk("file")
    with fails(errno.EEXIST):
        fs.create("file")
    made, fh = fs.create("file", flags=os.O_RDWR | os.O_TRUNC)
    assert made.attr.size == 0
    for name, number in (("dir", errno.EISDIR), ("link", errno.ELOOP)):
        with fails(number):
            fs.create(name, flags=os.O_RDWR)
    os.mkfifo(share / "fifo")
    with fails(errno.ENXIO):
        fs.create("fifo", flags=os.O_RDONLY)


def test_renames(fs: Client, share: Path) -> None:
    (share / "b").write_bytes(b"b")
    a, b = fs.walk("file"), fs.walk("b")
    with fails(errno.EEXIST):
        fs.rename("file", "b", flags=NOREPLACE)
    fs.rename("file", "b", flags=EXCHANGE)
    assert (share / "file").read_bytes() == b"b"
    assert fs.walk("b") == a
    assert fs.walk("file") == b
    fh = fs.open(b)
    fs.rename("b", "file")
    assert fs.read(fh) == b"b"
    assert fs.getattr(b).nlink == 0
    assert fs.getattr(a).size == 20
    fs.rename("file", "a name", flags=NOREPLACE)
    assert fs.getattr(a).size == 20
    for bad in (4, 8, 0xFFFF_FFFF):
        with fails(errno.EINVAL):
            fs.rename("a name", "c", flags=bad)
    with fails(errno.ENOENT):
        fs.rename("none", "c")


def test_unlinked_files_work_on(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    fh = fs.open(node, os.O_RDWR)
    fs.unlink("file")
    assert fs.write(fh, b"THAT") == 4
    assert fs.read(fh) == b"THAT the host wrote\n"
    assert fs.getattr(node).nlink == 0
    assert fs.getattr(node, fh).nlink == 0
    assert fs.setattr(node, SIZE, size=2).size == 2
    fs.release(fh)
    fs.forget(node)
    assert fs.fs.stats()["inodes"] == 1


def test_a_directory_that_is_gone(fs: Client) -> None:
    node = fs.mkdir("gone").nodeid
    fs.rmdir("gone")
    assert fs.getattr(node).nlink == 0
    assert fs.listdir(node) == []
    with fails(errno.ENOENT):
        fs.create("x", node=node)


def test_files_without_a_name(fs: Client, share: Path) -> None:
    made, fh = fs.tmpfile()
    assert fs.write(fh, b"hidden") == 6
    assert fs.getattr(made.nodeid).nlink == 0
    assert fs.link(made.nodeid, "shown").nodeid == made.nodeid
    assert (share / "shown").read_bytes() == b"hidden"
    fs.release(fh)
    assert fs.getattr(made.nodeid).size == 6


def test_append(fs: Client, share: Path) -> None:
    node = fs.walk("file")
    fh = fs.open(node, os.O_WRONLY | os.O_APPEND)
    with (share / "file").open("ab") as f:
        f.write(b"host\n")
    assert fs.write(fh, b"guest\n", 20) == 6
    assert (share / "file").read_bytes() == b"what the host wrote\nhost\nguest\n"
    # Pages that a mapping changed go back where they were.
    assert fs.write(fh, b"WHAT", 0, flags=1) == 4
    assert (share / "file").read_bytes() == b"WHAT the host wrote\nhost\nguest\n"

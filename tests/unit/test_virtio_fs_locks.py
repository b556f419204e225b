"""virtio-fs: locks that the host sees too, and whose files are whose."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fs_fixtures
from tests.fuse_client import (
    FLUSH,
    GETLK,
    GID,
    INTERRUPT,
    LOCK,
    MODE,
    ROOT,
    SETLK,
    SETLKW,
    UID,
    Client,
    fails,
)
from vmm.devices.virtio.fs import Fs

fs, share = fs_fixtures.fs, fs_fixtures.share

READ, WRITE, UNLOCK = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
OTHERS = os.geteuid() + 1000


@pytest.fixture
def locks(share: Path) -> Iterator[Client]:
    client = Client(share, locks="host")
    assert client.flags & (1 << 1 | 1 << 10) == 1 << 1 | 1 << 10
    yield client
    client.close()


@pytest.fixture
def fh(locks: Client) -> int:
    return locks.open(locks.walk("file"), os.O_RDWR)


def error(answer: tuple[int, bytes]) -> int:
    return answer[0]


def test_owners_exclude_each_other(locks: Client, fh: int) -> None:
    assert error(locks.lock(SETLK, fh, WRITE, 1, (0, 9))) == 0
    assert error(locks.lock(SETLK, fh, WRITE, 2, (5, 5))) == errno.EAGAIN
    assert error(locks.lock(SETLK, fh, READ, 2, (5, 5))) == errno.EAGAIN
    assert error(locks.lock(SETLK, fh, WRITE, 2, (10, 19))) == 0
    assert error(locks.lock(SETLK, fh, WRITE, 1, (0, 5))) == 0
    got = struct.unpack("<QQII", locks.lock(GETLK, fh, WRITE, 3, (3, 15))[1])
    assert got == (0, 9, WRITE, 0)
    assert struct.unpack("<QQII", locks.lock(GETLK, fh, READ, 3, (30, 40))[1])[2] == UNLOCK
    assert error(locks.lock(SETLK, fh, UNLOCK, 1, (0, 7))) == 0
    assert error(locks.lock(SETLK, fh, WRITE, 2, (5, 7))) == 0
    assert error(locks.lock(SETLK, fh, READ, 3, (8, 8))) == errno.EAGAIN
    # Closed by one owner, its locks go: what FUSE_FLUSH is for.
    assert locks.call(FLUSH, ROOT, struct.pack("<QIIQ", fh, 0, 0, 1)) == b""
    assert error(locks.lock(SETLK, fh, READ, 3, (8, 8))) == 0


def test_the_host_sees_them(locks: Client, fh: int, share: Path) -> None:
    with (share / "file").open("r+b") as f:
        assert error(locks.lock(SETLK, fh, WRITE)) == 0
        with fails(errno.EAGAIN):
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert error(locks.lock(SETLK, fh, UNLOCK)) == 0
        fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert error(locks.lock(SETLK, fh, READ)) == errno.EAGAIN
        fcntl.lockf(f, fcntl.LOCK_UN)
        assert error(locks.lock(SETLK, fh, WRITE, flock=True)) == 0
        with fails(errno.EAGAIN):
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        locks.release(fh)
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)


def wait_for(locks: Client, fh: int, owner: int = 2) -> int:
    """A lock that is not to be had; the request that waits for it."""
    body = LOCK.pack(fh, owner, 0, 9, WRITE, 0, 0, 0)
    sent = locks.send(SETLKW, ROOT, body, 0)
    locks.rig.until(lambda: locks.fs.stats()["waiting"] == 1, "a wait for the lock")
    return sent


def test_waiting_until_it_is_free(locks: Client, fh: int) -> None:
    assert error(locks.lock(SETLK, fh, WRITE, 1)) == 0
    sent = wait_for(locks, fh)
    locks.mark = locks.rig.driver.next
    # Others are served meanwhile, any number of them.
    for _ in range(20):
        assert locks.getattr(ROOT).ino
    locks.queue.add([locks.message(SETLK, ROOT, LOCK.pack(fh, 1, 0, 9, UNLOCK, 0, 0, 0))], [16])
    locks.queue.kick()
    assert {locks.receive()[:2] for _ in range(2)} == {(sent, 0), (locks.unique, 0)}
    assert error(locks.lock(SETLK, fh, READ, 3, (0, 0))) == errno.EAGAIN


def test_waiting_for_the_host(locks: Client, fh: int, share: Path) -> None:
    with (share / "file").open("r+b") as f:
        fcntl.lockf(f, fcntl.LOCK_EX)
        sent = wait_for(locks, fh)
        fcntl.lockf(f, fcntl.LOCK_UN)
        assert locks.receive()[:2] == (sent, 0)


def test_waiting_ends_with_an_interrupt(locks: Client, fh: int) -> None:
    assert error(locks.lock(SETLK, fh, WRITE, 1)) == 0
    sent = wait_for(locks, fh)
    locks.mark = locks.rig.driver.next
    locks.silent(INTERRUPT, 0, struct.pack("<Q", sent + 1000))
    locks.silent(INTERRUPT, 0, struct.pack("<Q", sent))
    assert locks.receive()[:2] == (sent, errno.EINTR)


def test_waiting_ends_with_a_reset(locks: Client, fh: int) -> None:
    assert error(locks.lock(SETLK, fh, WRITE, 1)) == 0
    wait_for(locks, fh)
    locks.rig.driver.reset()
    assert locks.fs.stats()["waiting"] == 0
    locks.start()
    fh = locks.open(locks.walk("file"), os.O_RDWR)
    assert error(locks.lock(SETLK, fh, WRITE, 2)) == 0


def test_locks_that_make_no_sense(locks: Client, fh: int) -> None:
    for kind, span in ((7, (0, 1)), (READ, (1, 0)), (READ, (1 << 63, 1 << 63))):
        for op in (SETLK, SETLKW):
            assert error(locks.lock(op, fh, kind, 1, span)) == errno.EINVAL
    assert error(locks.lock(SETLK, fh + 1, READ)) == errno.EBADF


def test_locks_are_the_guests_by_default(fs: Client) -> None:
    fh = fs.open(fs.walk("file"))
    assert not fs.flags & (1 << 1 | 1 << 10)
    assert fs.lock(SETLK, fh, READ) == (errno.ENOSYS, b"")


# ---- users ---------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
def test_root_passes_users_on(share: Path) -> None:
    fs = Client(share)
    assert fs.fs.uid == "pass"
    share.chmod(0o777)
    fs.uid, fs.gid = 1234, 2345
    for entry in (fs.create("f")[0], fs.mkdir("d"), fs.symlink("l", "x"), fs.tmpfile()[0]):
        assert (entry.attr.uid, entry.attr.gid) == (1234, 2345)
    assert (share / "f").stat().st_uid == 1234
    attr = fs.setattr(fs.walk("f"), UID | GID, uid=77, gid=88)
    assert (attr.uid, attr.gid) == (77, 88)
    (share / "dir").chmod(0o700)
    with fails(errno.EACCES):
        fs.create("f", node=fs.walk("dir"))
    fs.uid = 0xFFFF_FFFF
    with fails(errno.EINVAL):
        fs.create("nobody")
    fs.uid = fs.gid = 0
    assert fs.create("mine", node=fs.walk("dir"))[0].attr.uid == 0
    fs.close()


def apart(share: Path, code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which loads all it needs before it does what cannot be undone."""
    head = "import os, resource; from pathlib import Path; "
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"{head}from tests.unit import {__name__.split('.')[-1]} as t; {code}",
        ],
        cwd=share,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def squashed(share: Path) -> None:
    plain = Fs(str(share))
    assert plain.uid == ("squash" if os.geteuid() else "pass")
    plain.close()
    fs = Client(share, uid="squash")
    fs.uid = 4321
    for entry in (fs.lookup("file"), fs.create("f")[0], fs.mkdir("d")):
        assert (entry.attr.uid, entry.attr.gid) == (0, 0)
    assert (share / "f").stat().st_uid == os.geteuid()
    node = fs.walk("f")
    for uid in (0, os.geteuid()):
        assert fs.setattr(node, UID | GID, uid=uid, gid=0).uid == 0
    for changes in ({"uid": OTHERS, "gid": 0}, {"uid": 0, "gid": OTHERS}):
        with fails(errno.EPERM):
            fs.setattr(node, UID | GID, **changes)
    assert (share / "f").stat().st_uid == os.geteuid()
    assert fs.getattr(fs.walk("dir")).uid == 0
    fs.close()


def test_squash(share: Path) -> None:
    squashed(share)


@pytest.mark.skipif(os.geteuid() != 0, reason="run as an ordinary user, the other test does this")
def test_squash_as_an_ordinary_user(share: Path) -> None:
    """Ids are this process's, so that it needs another; one that reads what this one has loaded."""
    for path in (share, share / "file", share / "dir"):
        os.chown(path, 65534, 65534)
    become = "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
    done = apart(share, f"{become} t.squashed(Path('.'))")
    assert done.returncode == 0, done.stderr
    assert (share / "f").stat().st_uid == 65534


# ---- a host that forbids unshare(2), as containers do ------------------------------------------


def forbid_unshare() -> None:
    """For good, in this process: a filter that answers EPERM."""
    filters = ((0x20, 0, 0, 0), (0x15, 0, 1, 272), (6, 0, 0, 0x5_0001), (6, 0, 0, 0x7FFF_0000))
    code = b"".join(struct.pack("<HBBI", *f) for f in filters)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("<H6xQ", len(filters), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0
    assert libc.unshare(0x200) == -1


def without_unshare(share: Path) -> None:
    forbid_unshare()
    os.umask(0o077)
    fs = Client(share)
    assert fs.mkdir("wide", 0o1777).attr.mode == stat.S_IFDIR | 0o1777
    assert fs.create("open", 0o666)[0].attr.mode == stat.S_IFREG | 0o666
    assert fs.mknod("pipe", stat.S_IFIFO | 0o622).attr.mode == stat.S_IFIFO | 0o622
    node = fs.walk("file")
    assert fs.setattr(node, MODE, mode=0o604).mode == stat.S_IFREG | 0o604
    assert fs.link(node, "second").attr.nlink == 2
    link = fs.link(fs.walk("link"), "another link")
    assert link.attr.kind == stat.S_IFLNK
    fs.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the filter knows one number")
def test_a_host_without_unshare(share: Path) -> None:
    done = apart(share, "t.without_unshare(Path('.'))")
    assert done.returncode == 0, done.stderr

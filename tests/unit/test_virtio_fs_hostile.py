"""virtio-fs with a guest, or somebody on the host, who wants out of the shared directory, or more
than there is."""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests import fs_fixtures
from tests.fuse_client import (
    CREATE,
    IN,
    LOOKUP,
    MODE,
    ROOT,
    SETXATTR,
    SYMLINK,
    Client,
    fails,
    z,
)
from vmm.board import Board
from vmm.config import MachineConfig
from vmm.devices.virtio.fs import Fs
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

client, fs, share = fs_fixtures.client, fs_fixtures.fs, fs_fixtures.share

SECRET = b"not for guests"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "inner").write_bytes(SECRET)
    return path


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """``action`` again and again on another thread."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            action()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", ".", "", "dir/inner", "/etc", "../share/file", "file/"])
def test_names_that_are_paths(fs: Client, name: str) -> None:
    node = fs.walk("file")
    for ask in (
        lambda: fs.lookup(name),
        lambda: fs.lookup(name, fs.walk("dir")),
        lambda: fs.create(name),
        lambda: fs.create(name, flags=os.O_RDWR),
        lambda: fs.mkdir(name),
        lambda: fs.mknod(name, stat.S_IFREG),
        lambda: fs.symlink(name, "x"),
        lambda: fs.link(node, name),
        lambda: fs.unlink(name),
        lambda: fs.rmdir(name),
        lambda: fs.rename(name, "x"),
        lambda: fs.rename("file", name),
        lambda: fs.rename("file", name, flags=2),
    ):
        with fails(errno.EINVAL):
            ask()


def test_long_names(fs: Client, share: Path) -> None:
    longest = "n" * 255
    node = fs.create(longest)[0].nodeid
    assert fs.lookup(longest).nodeid == node
    fs.rename(longest, "m" * 255)
    assert (share / ("m" * 255)).exists()
    for ask in (
        lambda: fs.lookup("n" * 256),
        lambda: fs.create("n" * 4000),
        lambda: fs.rename("file", "n" * 256),
        lambda: fs.symlink("link2", "n" * 4097),
        lambda: fs.call(SETXATTR, node, struct.pack("<II", 0, 0) + z("user." + "n" * 251)),
    ):
        with fails(errno.ENAMETOOLONG):
            ask()


def test_names_without_an_end(fs: Client, share: Path) -> None:
    for op, body in (
        (LOOKUP, b"file"),
        (LOOKUP, b""),
        (SYMLINK, b"new\0target"),
        (SYMLINK, b"new\0"),
        (CREATE, struct.pack("<IIII", 2, 0o644, 0, 0) + b"new"),
    ):
        with fails(errno.EINVAL):
            fs.call(op, ROOT, body, 300)
    # The end is beyond what the header says there is.
    assert fs.ask(LOOKUP, ROOT, b"file\0", 300, length=IN.size + 4)[0] == errno.EINVAL
    assert not (share / "new").exists()


def test_names_of_any_bytes(fs: Client, share: Path) -> None:
    for name in (b"\xff\xfe", b"new\nline", b" ", b"...", b"-rf", b"\x01", "ä€😀".encode()):
        with open(os.path.join(os.fsencode(share), name), "wb") as f:
            f.write(name)
        assert fs.read(fs.open(fs.lookup(name).nodeid)) == name
        assert name in fs.listdir()


# ---- ways out -------------------------------------------------------------------------------


def test_links_that_lead_out_are_text(fs: Client, share: Path, outside: Path) -> None:
    (share / "way").symlink_to(outside)
    (share / "secret").symlink_to(outside / "inner")
    for name in ("way", "secret"):
        entry = fs.lookup(name)
        node = entry.nodeid
        assert entry.attr.kind == stat.S_IFLNK
        for ask in (
            partial(fs.lookup, "inner", node),
            partial(fs.open, node),
            partial(fs.opendir, node),
            partial(fs.create, "new", node=node),
            partial(fs.create, name, flags=os.O_RDWR),
            partial(fs.setattr, node, MODE, mode=0),
        ):
            with pytest.raises(OSError, match=r"Not a directory|Too many levels|not supported"):
                ask()
    assert os.listdir(outside) == ["inner"]


def test_a_name_that_is_a_link_now_and_then(fs: Client, share: Path, outside: Path) -> None:
    """The classic: between the look and the use. Whatever the guest gets is not the secret."""
    real, link, name = share / "real", share / "way", share / "x"
    real.mkdir()
    (real / "inner").write_bytes(b"harmless")
    link.symlink_to(outside)
    name.mkdir()

    def flip() -> None:
        with suppress(OSError):
            os.rename(name, share / "y")
        os.rename(real, name)
        os.rename(name, real)
        os.rename(link, name)
        os.rename(name, link)

    os.rmdir(name)
    got = 0
    with meanwhile(flip):
        for _ in range(3000):
            with suppress(OSError):
                entry = fs.lookup("x")
                if entry.attr.kind == stat.S_IFDIR:
                    inner = fs.lookup("inner", entry.nodeid)
                    data = fs.read(fs.open(inner.nodeid))
                    assert data == b"harmless"
                    got += 1
                fs.listdir(entry.nodeid)
                fs.create("planted", node=entry.nodeid)
    assert not (outside / "planted").exists()
    assert (outside / "inner").read_bytes() == SECRET


def test_a_file_that_is_a_link_now_and_then(fs: Client, share: Path, outside: Path) -> None:
    file, link, name = share / "plain", share / "way", share / "x"
    file.write_bytes(b"harmless")
    link.symlink_to(outside / "inner")

    def flip() -> None:
        os.rename(file, name)
        os.rename(name, file)
        os.rename(link, name)
        os.rename(name, link)

    node = fs.lookup("plain").nodeid
    seen = set()
    with meanwhile(flip):
        for i in range(3000):
            with suppress(OSError):
                if i % 3 == 0:
                    seen.add(fs.read(fs.open(fs.lookup("x").nodeid)))
                elif i % 3 == 1:
                    fs.write(fs.create("x", flags=os.O_RDWR)[1], b"harmless")
                else:
                    seen.add(fs.read(fs.open(node)))
            if i % 200 == 0:
                fs.rig.driver.reset()
                fs.start()
                with suppress(OSError):
                    node = fs.lookup("plain").nodeid
    assert seen <= {b"harmless", b""}
    assert (outside / "inner").read_bytes() == SECRET


def test_what_the_host_replaced_is_not_found(fs: Client, share: Path, outside: Path) -> None:
    node, inner = fs.walk("file"), fs.walk("inner", fs.walk("dir"))
    (share / "file").unlink()
    (share / "file").write_bytes(b"another")
    with fails(errno.ESTALE):
        fs.getattr(node)
    with fails(errno.ESTALE):
        fs.open(node)
    assert fs.read(fs.open(fs.walk("file"))) == b"another"
    # A directory in use is followed, as long as it is the same.
    (share / "dir").rename(share / "moved")
    assert fs.getattr(inner).size == 5
    (share / "dir").symlink_to(outside)
    with fails(errno.ENOTDIR):
        fs.lookup("inner", fs.walk("dir"))


def test_nothing_of_the_kernels(share: Path) -> None:
    fs = Client("/", ro=True)
    proc = fs.lookup("proc")
    assert proc.attr.mode == stat.S_IFDIR | 0o555
    assert fs.listdir(proc.nodeid) == []
    for name in ("self", "1", "sys", "version"):
        with fails(errno.ENOENT):
            fs.lookup(name, proc.nodeid)
    plus = fs.readdirplus_at(fs.opendir(), 0, room=100_000)
    again = {name: entry for name, entry, _ in plus}[b"proc"]
    assert again.nodeid == proc.nodeid
    for path in ("sys", "dev/pts"):
        with suppress(FileNotFoundError):
            assert fs.listdir(fs.walk(path)) == []
    null = fs.walk("dev/null")
    assert fs.getattr(null).kind == stat.S_IFCHR
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with pytest.raises(OSError, match=r"No such device|Read-only"):
            fs.open(null, flags)
    fs.close()
    for path in ("/proc", "/proc/self", "/sys"):
        with pytest.raises(ConfigError, match="part of the kernel"):
            Fs(path)


def test_shares_that_cannot_be(share: Path) -> None:
    for path in (share / "missing", share / "file"):
        with pytest.raises(HostError, match="cannot be shared"):
            Fs(str(path))
    for tag in ("t" * 37, "ä" * 19, "a\0b"):
        with pytest.raises(ConfigError, match="1 to 36 bytes"):
            Fs(str(share), tag=tag)


def test_two_shares_with_one_tag(share: Path) -> None:
    memory = GuestMemory([(0, 1 << 20)])
    board = Board(MachineConfig(memory="1M"), memory, IrqChip())
    one, other = Fs(str(share), name="fs0"), Fs(str(share / "dir"), tag="fs0", name="fs1")
    one.plug(board)
    with pytest.raises(ConfigError, match="both have the tag fs0"):
        other.plug(board)
    Fs(str(share / "dir"), name="fs1").plug(board)
    assert len(board.virtio) == 2
    for device in board.virtio:
        device.close()
    board.close()
    memory.close()

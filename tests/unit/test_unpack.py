"""Unpacking kernels on the host: exact, bounded, and kept on disk where nobody else can write."""

from __future__ import annotations

import collections
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import kernels
from vmm.arch import kcache, source, unpack
from vmm.arch.source import Source
from vmm.arch.x86_64 import boot, layout
from vmm.errors import BootError
from vmm.memory import GuestMemory

MIB = 1 << 20
KINDS = sorted(kernels.PACKERS)


def unpacked(packed: bytes, kind: str, limit: int = 64 * MIB) -> bytes:
    with Source.open(packed, "kernel") as src:
        return b"".join(unpack.unpack(src, 0, len(packed), kind, limit))


def noise(size: int) -> bytes:
    return bytes((i * i >> 3) & 0xFF for i in range(size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4096, 3 * MIB + 7])
def test_round_trip(kind: str, size: int) -> None:
    data = (noise(70000) + bytes(70000)) * (size // 140000 + 1)
    data = data[:size]
    assert unpacked(kernels.PACKERS[kind](data), kind) == data
    assert unpack.packing(kernels.PACKERS[kind](data)) == kind


def test_lz4_blocks_and_frames_follow_each_other() -> None:
    data = noise(100000)
    packed = kernels.lz4_legacy(data, block=30000)
    assert unpacked(packed + packed, "lz4") == data + data


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_refused_at_the_limit(kind: str) -> None:
    packed = kernels.PACKERS[kind](bytes(64 * MIB))
    limit = 20 * MIB
    assert limit >= unpack.size_limit(len(packed))
    tracemalloc.start()
    try:
        with Source.open(packed, "kernel") as src:
            pieces = unpack.unpack(src, 0, len(packed), kind, limit)
            with pytest.raises(BootError, match=f"more than {limit} bytes"):
                collections.deque(pieces, maxlen=0)
        assert tracemalloc.get_traced_memory()[1] < 3 * unpack.LZ4_BLOCK + MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_given_as_kernel_is_refused(kind: str) -> None:
    packed = kernels.PACKERS[kind](kernels.vmlinux() + bytes(64 * MIB))
    ram = GuestMemory(layout.ram_ranges(32 * MIB))
    with pytest.raises(BootError, match="which no kernel of its size does"):
        boot.load_kernel(ram, packed)
    ram.close()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("zstd", "lz4")])
def test_an_early_end_is_said(kind: str) -> None:
    packed = kernels.PACKERS[kind](noise(50000))
    with pytest.raises(BootError, match="is truncated"):
        unpacked(packed[: len(packed) // 2], kind)


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(BootError, match="pip install zstandard"):
        unpacked(kernels.PACKERS["zstd"](b"x"), "zstd")
    assert not unpack.available("zstd")


def test_sparse_files_hold_what_was_written(tmp_path: Path) -> None:
    data = noise(200000) + bytes(1 << 20) + noise(5) + bytes(300000)
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    pieces = (data[i : i + 333333] for i in range(0, len(data), 333333))
    assert unpack.write_sparse(fd, pieces) == len(data)
    assert (tmp_path / "f").read_bytes() == data
    assert os.fstat(fd).st_blocks * 512 < len(data)
    os.close(fd)


# ---- the cache ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "RACY_NS", -(10**18))  # files here are always fresh
    return tmp_path / "cache" / "vmm" / "kernels"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(kernels.bzimage(kernels.payload("gzip", kernels.vmlinux())))
    return path


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(layout.ram_ranges(32 * MIB))
    yield ram
    ram.close()


def load(kernel: Path) -> bytes:
    """The kernel's code as it lies in fresh guest memory."""
    ram = GuestMemory(layout.ram_ranges(32 * MIB))
    try:
        state = boot.load_kernel(ram, kernel, protocol="elf")
        assert state.rip == kernels.ENTRY
        return ram.read(kernels.BASE, len(kernels.CODE))
    finally:
        ram.close()


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir()) if cache.exists() else []


def no_unpacking(*_: object) -> None:
    raise AssertionError("the cache should have been used")


def test_the_second_start_does_not_unpack(
    cache: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(kernel) == kernels.CODE
    (entry,) = entries(cache)
    assert entry.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(unpack, "unpack", no_unpacking)
    assert load(kernel) == kernels.CODE


def test_a_changed_kernel_is_unpacked_again(cache: Path, kernel: Path) -> None:
    load(kernel)
    changed = bytes(reversed(kernels.CODE))
    segments = ((kernels.BASE, changed, len(changed)),)
    kernel.write_bytes(kernels.bzimage(kernels.payload("gzip", kernels.vmlinux(segments=segments))))
    assert load(kernel) == changed


def test_a_file_changed_just_now_is_not_trusted(
    cache: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "RACY_NS", 2_000_000_000)
    assert load(kernel) == kernels.CODE
    assert not entries(cache)


def test_whole_packed_kernels_are_kept_too(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bzImage.xz"
    path.write_bytes(
        kernels.PACKERS["xz"](kernels.bzimage(kernels.payload("zstd", kernels.vmlinux())))
    )
    assert load(path) == kernels.CODE
    assert len(entries(cache)) == 2
    monkeypatch.setattr(unpack, "unpack", no_unpacking)
    assert load(path) == kernels.CODE


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "header", "garbage"])
def test_a_damaged_entry_is_replaced(cache: Path, kernel: Path, damage: str) -> None:
    load(kernel)
    (entry,) = entries(cache)
    good = entry.read_bytes()
    entry.write_bytes(
        {
            "truncated": good[: len(good) // 2],
            "empty": b"",
            "longer": good + b"x",
            "header": good[:20] + b"\xff" + good[21:],
            "garbage": noise(5000),
        }[damage]
    )
    assert load(kernel) == kernels.CODE
    assert entry.read_bytes() == good


def test_entries_others_could_have_written_are_not_used(cache: Path, kernel: Path) -> None:
    load(kernel)
    (entry,) = entries(cache)
    key = entry.name.removesuffix(f"-v{kcache.VERSION}{kcache.SUFFIX}")
    found = kcache.lookup(key)
    assert found
    os.close(found[0])
    entry.chmod(0o620)
    assert kcache.lookup(key) is None
    load(kernel)
    cache.chmod(0o770)
    assert kcache.lookup(key) is None
    assert kcache.store("k", lambda fd: os.write(fd, b"x")) is None
    cache.chmod(0o700)


def test_links_are_not_followed(cache: Path, kernel: Path, tmp_path: Path) -> None:
    load(kernel)
    (entry,) = entries(cache)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    key = entry.name.removesuffix(f"-v{kcache.VERSION}{kcache.SUFFIX}")
    assert kcache.lookup(key) is None
    assert load(kernel) == kernels.CODE
    assert not entry.is_symlink()


@pytest.mark.parametrize("where", ["file", "relative", "none"])
def test_no_usable_cache_is_no_error(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(source, "RACY_NS", -(10**18))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", {"file": str(kernel), "relative": "x"}.get(where, ""))
    monkeypatch.delenv("HOME")
    before = sorted(tmp_path.iterdir())
    assert load(kernel) == kernels.CODE
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_no_error(
    cache: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert load(kernel) == kernels.CODE
    assert not entries(cache)


def test_an_interrupted_unpack_leaves_nothing(
    cache: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(unpack, "write_sparse", interrupted)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        load(kernel)
    assert not entries(cache)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_damaged_payload_is_not_kept(cache: Path, tmp_path: Path) -> None:
    vmlinux = kernels.vmlinux()
    lying = kernels.PACKERS["xz"](vmlinux) + (len(vmlinux) + 1).to_bytes(4, "little")
    path = tmp_path / "k"
    path.write_bytes(kernels.bzimage(lying))
    for _ in range(2):
        with pytest.raises(BootError, match="damaged payload"):
            load(path)
    assert not entries(cache)


def test_only_the_newest_are_kept(cache: Path) -> None:
    def fill(fd: int) -> int:
        return os.write(fd, b"x" * 100)

    for i in range(kcache.KEEP + 3):
        stored = kcache.store(f"key{i}", fill)
        assert stored
        os.close(stored[0])
        os.utime(cache / f"key{i}-v{kcache.VERSION}{kcache.SUFFIX}", (i, i))
    assert len(entries(cache)) == kcache.KEEP
    assert kcache.lookup("key0") is None
    found = kcache.lookup(f"key{kcache.KEEP + 2}")
    assert found
    assert found[1] == 100
    os.close(found[0])


def test_old_leftovers_are_removed(cache: Path, kernel: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    (cache / "old.1-2.tmp").touch()
    os.utime(cache / "old.1-2.tmp", (1, 1))
    (cache / "new.1-2.tmp").touch()
    load(kernel)
    assert [e.name for e in entries(cache) if e.suffix == ".tmp"] == ["new.1-2.tmp"]


def test_fds_are_given_back(cache: Path, kernel: Path, tmp_path: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load(kernel)
        kernel.touch()
        with pytest.raises(BootError):
            load(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == fds


# ---- loading from files -------------------------------------------------------------------


def test_holes_are_skipped_and_data_is_not(tmp_path: Path, memory: GuestMemory) -> None:
    path = tmp_path / "f"
    data = noise(5000) + bytes(3 * MIB) + noise(5000) + bytes(MIB)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    unpack.write_sparse(fd, iter([data]))
    os.close(fd)
    with Source.open(path, "kernel") as src:
        for offset, size in [(0, len(data)), (4000, 2000), (MIB, MIB), (4 * MIB, 100)]:
            memory.view(0, 8 * MIB)[:] = bytes(8 * MIB)
            src.load(memory, 4096, offset, size)
            assert memory.read(4096, size) == data[offset : offset + size]
        assert memory.read(4096 + 100, 100) == bytes(100)


def test_a_file_that_shrinks_meanwhile_is_refused(tmp_path: Path, memory: GuestMemory) -> None:
    path = tmp_path / "f"
    path.write_bytes(noise(10000))
    with Source.open(path, "kernel") as src:
        os.truncate(path, 5000)
        with pytest.raises(BootError, match="shrank"):
            src.load(memory, 0, 0, 10000)
        with pytest.raises(BootError, match="shrank"):
            src.read(0, 10000)

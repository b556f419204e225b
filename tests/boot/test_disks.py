"""What a stock Linux makes of a disk's queues, discards, caches, block sizes and new sizes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.fetch import busybox
from guests.fio import fio_archive
from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.boot.conftest import Boot
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from vmm import Machine
from vmm.devices.virtio.blk import Blk
from vmm.disk import CACHES
from vmm.guest.kernels import packages_dir
from vmm.guest.modules import ModuleTree, read_module

transports = pytest.mark.parametrize("transport", ["pci", "mmio"])

MIB = 1 << 20
NAMES = ("vda", "vdb", "vdc", "vdd")


@transports
def test_queues_and_discards(boot: Boot, tmp_path: Path, transport: str) -> None:
    """Four queues at once, each on a thread of its own; then all is given back to the host."""
    disk = tmp_path / "disk.img"
    content = os.urandom(8 * MIB)
    disk.write_bytes(content)
    os.truncate(disk, 16 * MIB)
    script = """\
echo "queues=$(ls /sys/block/vda/mq | wc -l)"
for i in 0 1 2 3; do
    (dd if=/dev/vda bs=64k skip=$((i*32)) count=32 iflag=direct 2>/dev/null |
        sha256sum > /tmp/$i
     dd if=/dev/vda of=/dev/vda bs=64k skip=$((i*32)) seek=$((128+i*32)) count=32 \
        iflag=direct oflag=direct 2>/dev/null) &
done
wait
for i in 0 1 2 3; do echo "part$i=$(cut -d' ' -f1 /tmp/$i)"; done
sync
echo "halves=$(dd if=/dev/vda bs=1M skip=8 2>/dev/null | sha256sum | cut -d' ' -f1)"
echo "most=$(cat /sys/block/vda/queue/discard_max_bytes)"
echo "grain=$(cat /sys/block/vda/queue/discard_granularity)"
echo "zeroes=$(cat /sys/block/vda/queue/write_zeroes_max_bytes)"
blkdiscard -o 1048576 /dev/vda && echo "discard=ok"
echo "left=$(dd if=/dev/vda bs=1M 2>/dev/null | tr -d '\\0' | wc -c)"
"""
    booted = boot(script, disks=[str(disk)], transport=transport, cpus=4, io_threads="queue").ok()
    assert booted.value("queues") == "4"
    for i in range(4):
        part = content[i * 2 * MIB : (i + 1) * 2 * MIB]
        assert booted.value(f"part{i}") == hashlib.sha256(part).hexdigest()
    assert booted.value("halves") == hashlib.sha256(content).hexdigest()
    assert booted.value("most") == str(1 << 30)
    assert booted.value("grain") == "4096"
    assert booted.value("zeroes") == str(1 << 30)
    assert booted.value("discard") == "ok"
    assert booted.value("left") == str(MIB - content[:MIB].count(0))
    assert disk.stat().st_blocks <= 2 * MIB // 512
    assert disk.read_bytes() == content[:MIB] + bytes(15 * MIB)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files can be used around the page cache, unlike those on a tmpfs of an old
    kernel; for who may not mount one, any directory."""
    if direct_io(tmp_path) or os.getuid():
        yield tmp_path
        return
    libc = ctypes.CDLL(None, use_errno=True)
    places = (Path("/"), *Path(packages_dir()).iterdir())
    trees = [place / "lib/modules" / os.uname().release for place in places]
    tree = next(tree for tree in trees if tree.is_dir())
    for path in ModuleTree(str(tree)).resolve(["loop", "ext4", "crc32c_generic"]):
        module = read_module(path)
        if libc.syscall(175, module, len(module), b""):  # init_module(2)
            assert ctypes.get_errno() == errno.EEXIST, os.strerror(ctypes.get_errno())
    whole, mounted = tmp_path / "ext4.img", tmp_path / "direct"
    whole.touch()
    os.truncate(whole, 200 * MIB)
    mounted.mkdir()
    subprocess.run([busybox(), "mke2fs", "-F", whole], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["mount", "-t", "ext4", "-o", "loop", whole, mounted], check=True)
    yield mounted
    subprocess.run(["umount", "-l", mounted], check=True)


def direct_io(folder: Path) -> bool:
    """Whether files there can be used around the page cache."""
    (folder / "probe").touch()
    try:
        os.close(os.open(folder / "probe", os.O_DIRECT | os.O_RDWR))
    except OSError:
        return False
    return True


def a_disk_for_each(place: Path, size: int) -> dict[str, Path]:
    """Sparse images by the cache modes that can be had there, in the order of /dev/vda, vdb..."""
    modes = CACHES if direct_io(place) else [c for c in CACHES if c.startswith("write")]
    paths = {cache: place / f"{cache}.img" for cache in modes}
    for path in paths.values():
        path.touch()
        os.truncate(path, size)
    return paths


@transports
def test_a_file_system_in_every_cache_mode(boot: Boot, place: Path, transport: str) -> None:
    disks = a_disk_for_each(place, 32 * MIB)
    script = """\
echo "vmm-guest: up"
dd if=/dev/urandom of=/tmp/a bs=1M count=4 2>/dev/null
for d in $(ls /sys/block | grep vd); do
    type=/sys/block/$d/cache_type
    echo "$d-mode=$(cat $type)"
    echo "$d-block=$(cat /sys/block/$d/queue/logical_block_size)"
    mke2fs -b 4096 /dev/$d > /dev/null && mount -t ext4 /dev/$d /mnt
    cp /tmp/a /mnt/a; cp /tmp/a /mnt/b; sync; umount /mnt
    echo 3 > /proc/sys/vm/drop_caches
    mount -t ext4 /dev/$d /mnt
    cmp /mnt/a /mnt/b && cmp /mnt/a /tmp/a && echo "$d-same=yes"
    rm /mnt/b; sync; fstrim /mnt && echo "$d-trimmed=yes"
    cmp /mnt/a /tmp/a && echo "$d-still=yes"
    umount /mnt
    [ "$(cat $type)" = "write back" ] && n="write through" || n="write back"
    echo "$n" > $type && echo "$d-switched=$(cat $type)"
done
poweroff -f
"""
    archive = build(script, kernel_tree(), modules=(*VIRTIO_MODULES, "ext4"))
    booted = boot(
        "",
        initrds=[str(archive)],
        disks=[f"{path},cache={cache},block-size=4096" for cache, path in disks.items()],
        transport=transport,
    ).ok()
    modes = ["write through", "write back"]
    for (cache, path), name in zip(disks.items(), NAMES, strict=False):
        back = cache in ("writeback", "none")
        assert booted.value(f"{name}-mode") == modes[back], booted.report()
        assert booted.value(f"{name}-switched") == modes[not back]
        assert booted.value(f"{name}-block") == "4096"
        for what in ("same", "trimmed", "still"):
            assert booted.value(f"{name}-{what}") == "yes"
        assert path.stat().st_blocks * 512 < 8 * MIB


@transports
def test_fio_verifies_what_it_wrote(
    boot: Boot, initramfs: Callable[[str], Path], place: Path, transport: str
) -> None:
    """Blocks of all sizes at random places with checksums of their own, beside each other."""
    disks = a_disk_for_each(place, 8 * MIB)
    script = """\
for d in $(ls /sys/block | grep vd); do
    fio --name=$d --filename=/dev/$d --rw=randwrite --bsrange=4k-64k --size=4M --numjobs=2 \
        --offset_increment=4M --ioengine=libaio --iodepth=16 --direct=1 --thread \
        --verify=crc32c --verify_fatal=1 --fsync=32 --output=/tmp/$d.log && echo "$d=verified" ||
        cat /tmp/$d.log
done
"""
    base = initramfs(script)
    booted = boot(
        "",
        initrds=[str(base), str(fio_archive())],
        disks=[f"{path},cache={cache},queues=2" for cache, path in disks.items()],
        cpus=2,
        transport=transport,
    ).ok()
    for name in NAMES[: len(disks)]:
        assert booted.value(name) == "verified"


@transports
def test_a_new_size_is_seen(kernel: str, tmp_path: Path, transport: str) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(MIB))
    script = """\
echo "vmm-guest: ready, $(cat /sys/block/vda/size)"
n=2048
while [ "$n" = 2048 ]; do sleep 0.1; n=$(cat /sys/block/vda/size); done
echo "size=$n"
echo "end" | dd of=/dev/vda bs=512 seek=4095 conv=fsync 2>/dev/null && echo "wrote=ok"
poweroff -f
"""
    with Machine(
        kernel=kernel,
        initrds=[build(script, kernel_tree())],
        append="quiet",
        memory="256M",
        disks=[str(disk)],
        transport=transport,
        timeout=BOOT_TIMEOUT,
    ) as vm:
        vm.console.expect("ready, 2048", timeout=BOOT_TIMEOUT)
        count_boot()
        (found,) = [d for d in vm.devices if isinstance(d, Blk)]
        found.resize(2 * MIB)
        vm.console.expect("size=4096", timeout=60)
        vm.console.expect("wrote=ok", timeout=60)
        assert vm.wait().reason == "poweroff"
    assert disk.read_bytes()[4095 * 512 :][:4] == b"end\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a file system to fill")
@transports
def test_a_full_host_pauses_the_guest(kernel: str, tmp_path: Path, transport: str) -> None:
    """werror=enospc on a file system without room; resume tries again, and nothing is lost."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", small], check=True)
    disk, ballast = small / "disk.img", small / "ballast"
    ballast.write_bytes(bytes(5 * MIB))
    disk.touch()
    os.truncate(disk, 16 * MIB)
    script = """\
echo "vmm-guest: up"
dd if=/dev/zero bs=1M count=6 2>/dev/null | tr '\\0' 'w' > /dev/vda
sync && echo "wrote=ok"
poweroff -f
"""
    paused = threading.Event()
    try:
        with Machine(
            kernel=kernel,
            initrds=[build(script, kernel_tree())],
            append="quiet",
            memory="256M",
            disks=[f"{disk},werror=enospc"],
            transport=transport,
            timeout=BOOT_TIMEOUT,
        ) as vm:
            (found,) = [d for d in vm.devices if isinstance(d, Blk)]
            pause = found.on_io_error
            assert pause is not None
            found.on_io_error = lambda blk, error: (pause(blk, error), paused.set())  # type: ignore[func-returns-value, assignment]
            assert paused.wait(BOOT_TIMEOUT)
            count_boot()
            assert found.stats()["held"] > 0
            assert "wrote=ok" not in vm.console.text
            ballast.unlink()
            vm.resume()
            vm.console.expect("wrote=ok", timeout=60)
            assert found.stats()["errors"] == 0
            assert vm.wait().reason == "poweroff"
        assert disk.read_bytes() == b"w" * (6 * MIB) + bytes(10 * MIB)
    finally:
        subprocess.run(["umount", "-l", small], check=True)

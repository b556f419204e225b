"""virtio-pmem under Linux's stock drivers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.boot.conftest import UP, Boot
from vmm.devices.virtio.pmem import ALIGN, Pmem

#: The kernel adds it in the background.
WAIT = """\
for i in $(seq 50); do [ -b /dev/pmem0 ] && break; sleep 0.1; done
[ -b /dev/pmem0 ] || dmesg | tail -30
"""
MODULES = (*VIRTIO_MODULES, "nd_pmem", "virtio_pmem")

pytestmark = pytest.mark.parametrize("transport", ["pci", "mmio"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "pmem.img"
    path.write_bytes(os.urandom(8 * ALIGN))
    return path


def options(script: str, *modules: str) -> dict[str, Any]:
    script = f'echo "{UP}"\n{WAIT}{script}\npoweroff -f'
    archive = build(script, kernel_tree(), modules=(*MODULES, *modules))
    return {"initrds": [str(archive)]}


def the_pmem(booted: Any) -> Pmem:
    (pmem,) = [d for d in booted.machine.devices if isinstance(d, Pmem)]
    return pmem


def test_read_write_and_flush(boot: Boot, image: Path, transport: str) -> None:
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    script = """\
echo "size=$(cat /sys/block/pmem0/size)"
echo "sum=$(sha256sum /dev/pmem0 | cut -d' ' -f1)"
dd if=/dev/urandom of=/tmp/new bs=64k count=4 2>/dev/null
dd if=/tmp/new of=/dev/pmem0 bs=64k seek=3 conv=fsync 2>/dev/null && echo wrote=ok
echo "new=$(sha256sum /tmp/new | cut -d' ' -f1)"
"""
    booted = boot(pmem=str(image), transport=transport, **options(script)).ok()
    assert booted.value("size") == str(8 * ALIGN // 512)
    assert booted.value("sum") == before
    assert booted.value("wrote") == "ok"
    stats = the_pmem(booted).stats()
    assert stats["flushes"] > 0 == stats["failed"]
    written = image.read_bytes()[3 * 65536 : 7 * 65536]
    assert hashlib.sha256(written).hexdigest() == booted.value("new")


def test_flushes_of_a_read_only_one_fail(boot: Boot, image: Path, transport: str) -> None:
    """The driver knows no read-only memory: it writes, and the flush fails."""
    before = image.read_bytes()
    script = """\
echo "sum=$(sha256sum /dev/pmem0 | cut -d' ' -f1)"
dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=fsync 2>/dev/null || echo "write=refused"
"""
    booted = boot(pmem=f"{image},ro", transport=transport, **options(script)).ok()
    assert booted.value("sum") == hashlib.sha256(before).hexdigest()
    assert booted.value("write") == "refused"
    assert "is read-only" in the_pmem(booted).faults()[0]
    assert image.read_bytes() == before


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="no mke2fs")
def test_ext4_with_dax_flushes_files(boot: Boot, image: Path, transport: str) -> None:
    """ext4 with -o dax: files are the host's pages."""
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", str(image)], check=True, timeout=60
    )
    script = """\
mount -t ext4 -o dax /dev/pmem0 /mnt
grep pmem0 /proc/mounts | grep -q dax && echo dax=yes
dd if=/dev/urandom of=/mnt/file bs=64k count=16 conv=fsync 2>/dev/null
echo "sum=$(sha256sum /mnt/file | cut -d' ' -f1)"
umount /mnt && echo unmounted=yes
"""
    booted = boot(pmem=str(image), transport=transport, **options(script, "ext4")).ok()
    assert (booted.value("dax"), booted.value("unmounted")) == ("yes", "yes")
    assert the_pmem(booted).stats()["failed"] == 0
    copy = subprocess.run(
        ["debugfs", "-R", "cat file", str(image)], capture_output=True, check=True, timeout=60
    )
    assert hashlib.sha256(copy.stdout).hexdigest() == booted.value("sum")

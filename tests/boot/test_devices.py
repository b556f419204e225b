"""Stock drivers on vmm's devices, on both transports, under a real kernel."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.boot.conftest import Boot
from tests.linux import BOOT_TIMEOUT

transports = pytest.mark.parametrize("transport", ["pci", "mmio"])

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """2 MiB that no two sectors of are alike."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(2 * MIB))
    return path


@transports
def test_disk_reads_and_writes(boot: Boot, disk: Path, transport: str) -> None:
    before = hashlib.sha256(disk.read_bytes()).hexdigest()
    script = """\
echo "size=$(cat /sys/block/vda/size)"
echo "serial=$(cat /sys/block/vda/serial)"
echo "cache=$(cat /sys/block/vda/queue/write_cache)"
echo "sum=$(sha256sum /dev/vda | cut -d' ' -f1)"
dd if=/dev/urandom of=/tmp/new bs=64k count=16 2>/dev/null
dd if=/tmp/new of=/dev/vda bs=64k seek=8 conv=fsync 2>/dev/null && echo wrote=ok
echo "new=$(sha256sum /tmp/new | cut -d' ' -f1)"
"""
    booted = boot(script, disks=[f"{disk},serial=vmm-test-1"], transport=transport).ok()
    assert booted.value("size") == str(2 * MIB // 512)
    assert booted.value("serial") == "vmm-test-1"
    assert booted.value("cache") == "write back"
    assert booted.value("sum") == before
    assert booted.value("wrote") == "ok"
    written = disk.read_bytes()[8 * 65536 : 24 * 65536]
    assert hashlib.sha256(written).hexdigest() == booted.value("new")


@transports
def test_read_only_disk_stays_as_it_was(boot: Boot, disk: Path, transport: str) -> None:
    before = disk.read_bytes()
    script = """\
echo "ro=$(cat /sys/block/vda/ro)"
dd if=/dev/zero of=/dev/vda bs=4k count=1 2>/dev/null || echo "write=refused"
"""
    booted = boot(script, disks=[f"{disk},ro"], transport=transport).ok()
    assert booted.value("ro") == "1"
    assert booted.value("write") == "refused"
    assert disk.read_bytes() == before


@transports
def test_random_numbers(boot: Boot, transport: str) -> None:
    script = """\
echo "rng=$(cat /sys/class/misc/hw_random/rng_current)"
dd if=/dev/hwrng of=/tmp/a bs=64 count=16 2>/dev/null
dd if=/dev/hwrng of=/tmp/b bs=64 count=16 2>/dev/null
cmp -s /tmp/a /tmp/b || echo "differ=yes"
echo "bytes=$(wc -c < /tmp/a)"
"""
    booted = boot(script, transport=transport).ok()
    assert booted.value("rng").startswith("virtio_rng")
    assert booted.value("differ") == "yes"
    assert booted.value("bytes") == "1024"


@transports
def test_virtio_console_both_ways(boot: Boot, tmp_path: Path, transport: str) -> None:
    log = tmp_path / "hvc0.log"
    script = """\
for i in 1 2 3 4 5 6 7 8; do [ -c /dev/hvc0 ] && break; sleep 0.2; done
echo "hvc=$([ -c /dev/hvc0 ] && echo yes)" > /dev/ttyS0
seq 1 2000 > /dev/hvc0
echo "hvc-done" > /dev/hvc0
"""
    booted = boot(
        script, transport=transport, console=str(log), append="quiet console=hvc0 console=ttyS0"
    )
    text = log.read_text(errors="replace").replace("\r", "")
    assert "\n".join(str(i) for i in range(1, 2001)) in text, booted.report()
    assert "hvc-done" in text


def test_intx_without_msi(boot: Boot, disk: Path) -> None:
    """pci=nomsi: every interrupt is a level-triggered pin."""
    script = """\
echo "irqs=$(grep -c virtio /proc/interrupts)"
echo "sum=$(sha256sum /dev/vda | cut -d' ' -f1)"
"""
    booted = boot(script, disks=[str(disk)], append="quiet pci=nomsi").ok()
    assert booted.value("sum") == hashlib.sha256(disk.read_bytes()).hexdigest()


def test_several_disks_and_vcpus_at_once(boot: Boot, tmp_path: Path) -> None:
    paths = []
    for nr in range(4):
        paths.append(tmp_path / f"d{nr}.img")
        paths[nr].write_bytes(os.urandom(2 * MIB))
    script = """\
for d in a b c d; do (sha256sum /dev/vd$d > /tmp/$d) & done; wait
for d in a b c d; do echo "vd$d=$(cut -d' ' -f1 /tmp/$d)"; done
"""
    booted = boot(script, disks=[str(p) for p in paths], cpus=4).ok()
    for nr, letter in enumerate("abcd"):
        assert booted.value(f"vd{letter}") == hashlib.sha256(paths[nr].read_bytes()).hexdigest()


def test_a_device_no_driver_claimed_is_named(boot: Boot, disk: Path, kernel: str) -> None:
    """An initramfs without virtio_blk: the disk is there and nobody takes it."""
    from guests.initramfs import build, kernel_tree

    script = 'echo "vmm-guest: up"\npoweroff -f'
    archive = build(script, kernel_tree(), modules=("virtio_pci",))
    booted = boot("", initrds=[str(archive)], disks=[str(disk)]).ok()
    told = [text for d in booted.machine.devices if (text := d.unclaimed())]
    assert any("CONFIG_VIRTIO_BLK" in text for text in told), told


def test_power_button(kernel: str) -> None:
    """The guest's ACPI counts the press, once its button driver listens."""
    from guests.initramfs import build, kernel_tree
    from tests.conftest import count_boot
    from vmm import Machine

    script = """\
cd /sys/firmware/acpi/interrupts
echo "vmm-guest: ready, $(cat ff_pwr_btn)"
n=0
while [ "$n" = 0 ]; do sleep 0.1; read n rest < ff_pwr_btn; done
echo "pressed=$n"
poweroff -f
"""
    archive = build(script, kernel_tree(), modules=("button",))
    with Machine(
        kernel=kernel, initrds=[archive], append="quiet", memory="256M", timeout=BOOT_TIMEOUT
    ) as vm:
        vm.console.expect("ready", timeout=BOOT_TIMEOUT)
        count_boot()
        vm.press_power_button()
        vm.console.expect("pressed=1", timeout=60)
        assert vm.wait().reason == "poweroff"

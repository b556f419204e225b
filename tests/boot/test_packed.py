"""Stock drivers on packed queues, on both transports."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.boot.conftest import UP, Boot

MIB = 1 << 20
F_RING_PACKED = 34


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_disk_console_and_rng_on_packed_queues(boot: Boot, tmp_path: Path, transport: str) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(os.urandom(4 * MIB))
    before = hashlib.sha256(disk.read_bytes()).hexdigest()
    text = tmp_path / "console.txt"
    # Everything is said by way of the virtio console.
    script = f"""\
for i in 1 2 3 4 5 6 7 8; do [ -c /dev/hvc0 ] && break; sleep 0.2; done
exec > /dev/hvc0
echo "{UP}"
for d in /sys/bus/virtio/devices/*; do
  f=$(cat $d/features)
  echo "packed_$(cat $d/device | tail -c 2)=$(echo $f | cut -c{F_RING_PACKED + 1})"
done
echo "sum=$(sha256sum /dev/vda | cut -d' ' -f1)"
dd if=/dev/urandom of=/tmp/new bs=64k count=32 2>/dev/null
for i in 1 2 3 4 5 6; do
  dd if=/tmp/new of=/dev/vda bs=64k seek=8 conv=fsync 2>/dev/null || echo "wrote=no"
  echo 3 > /proc/sys/vm/drop_caches
  dd if=/dev/vda of=/tmp/back bs=64k skip=8 count=32 2>/dev/null
  cmp /tmp/new /tmp/back || echo "wrote=no"
done
echo "new=$(sha256sum /tmp/new | cut -d' ' -f1)"
echo "rng=$(cat /sys/class/misc/hw_random/rng_current)"
dd if=/dev/hwrng bs=512 count=64 2>/dev/null | wc -c > /tmp/n
echo "random=$(cat /tmp/n)"
seq 1 200
"""
    booted = boot(
        script,
        disks=[str(disk)],
        console=str(text),
        append="quiet console=hvc0 console=ttyS0",
        transport=transport,
        packed=True,
    ).ok()
    report = booted.report()
    assert [booted.value(f"packed_{nr}") for nr in (2, 3, 4)] == ["1"] * 3, report
    assert booted.value("sum") == before
    assert "wrote=no" not in booted.console
    written = disk.read_bytes()[8 * 65536 : 40 * 65536]
    assert hashlib.sha256(written).hexdigest() == booted.value("new")
    assert booted.value("rng").startswith("virtio_rng")
    assert booted.value("random") == "32768"
    lines = "".join(f"{n}\n" for n in range(1, 201))
    assert lines in text.read_text().replace("\r", "")

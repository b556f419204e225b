"""Debian's stock cloud kernel by every protocol, size and transport."""

from __future__ import annotations

import os
from itertools import product

import pytest

from tests.boot.conftest import Boot

#: By default five boots in a row stand for fifty (an emulated host boots a dozen or more in a row
#: anyway), and nine rows for all: each value meets each of the others.
FULL = os.environ.get("VMM_FULL") == "1"
PROTOCOLS, TRANSPORTS = ("bzimage", "elf", "pvh"), ("pci", "mmio")
CPUS, MEMORY = (1, 4), (128, 512, 5120)
ROWS = [
    (PROTOCOLS[p], CPUS[c], MEMORY[m], TRANSPORTS[t])
    for p, c, m, t in product(range(3), range(2), range(3), range(2))
    if FULL or ((p + m) % 2, (p + m + m // 2) % 2) == (c, t)
]

PROBE = """\
echo "cpus=$(nproc)"
echo "mem=$(awk '/MemTotal/{print $2}' /proc/meminfo)"
echo "virtio=$(ls /sys/bus/virtio/devices | wc -l)"
echo "release=$(uname -r)"
echo "clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
"""

MIB = 1024  # in the KiB of /proc/meminfo


@pytest.mark.parametrize(("protocol", "cpus", "memory", "transport"), ROWS)
def test_boots(boot: Boot, protocol: str, cpus: int, memory: int, transport: str) -> None:
    booted = boot(PROBE, boot=protocol, cpus=cpus, memory=f"{memory}M", transport=transport).ok()
    assert booted.value("cpus") == str(cpus)
    # The kernel's own share is not in MemTotal: its image, and 1/64 for its page structs.
    total = int(booted.value("mem"))
    assert memory * MIB * 0.55 < total < memory * MIB, booted.report()
    assert int(booted.value("virtio")) >= 1  # the entropy source, whatever the transport
    assert booted.value("release").endswith("-cloud-amd64")
    assert booted.value("clock") == "kvm-clock"


@pytest.mark.timeout(2400)
def test_many_in_a_row(boot: Boot) -> None:
    for turn in range(50 if FULL else 5):
        booted = boot("echo turn", memory="128M")
        assert booted.result.status == 0, f"boot {turn}: {booted.report()}"
        booted.ok()
        booted.machine.close()

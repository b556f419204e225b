"""A Debian with systemd on virtio-blk, used over its serial console as a person would."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from guests.fetch import fetch
from guests.initramfs import build, kernel_tree
from tests.conftest import count_boot
from vmm import Machine

SWITCH_ROOT = """\
for i in 1 2 3 4 5 6 7 8 9; do [ -b /dev/vda ] && break; sleep 0.2; done
insmod /lib/ext4.ko 2>/dev/null
mkdir -p /root; mount -o rw /dev/vda /root || exec sh
umount /proc; umount /sys
mount -o move /dev /root/dev
exec switch_root /root /sbin/init
"""

DEADLINE = 400
#: It takes some minutes in an emulated host; each transport's disks have tests of their own.
TRANSPORTS = ["pci", "mmio"] if os.environ.get("VMM_FULL") == "1" else ["pci"]


@pytest.mark.timeout(DEADLINE + 60)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_debian_reaches_login_and_powers_off(kernel: str, tmp_path: Path, transport: str) -> None:
    disk = tmp_path / "root.img"
    shutil.copyfile(fetch("rootfs"), disk)
    archive = build(SWITCH_ROOT, kernel_tree())
    with Machine(
        kernel=kernel,
        initrds=[archive],
        append="quiet systemd.show_status=0 fsck.mode=skip",
        memory="512M",
        disks=[str(disk)],
        transport=transport,
        timeout=DEADLINE,
    ) as vm:
        vm.console.expect("login:", timeout=DEADLINE)
        count_boot()
        vm.console.send("root\n")
        vm.console.expect("# ", timeout=120)
        vm.console.send("echo sum=$((6*7)) on $(findmnt -no SOURCE /)\n")
        vm.console.expect("sum=42 on /dev/vda", timeout=60)
        vm.console.send("poweroff\n")
        result = vm.wait()
    assert (result.reason, result.status) == ("poweroff", 0), result.console

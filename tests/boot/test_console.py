"""Linux at the serial port, the clock and the keyboard controller."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from tests.boot.conftest import UP, Boot
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from vmm import Machine


def test_what_linux_finds(boot: Boot) -> None:
    booted = boot(
        'echo "uart=$(grep ^0: /proc/tty/driver/serial)"\n'
        'echo "rtc=$(cat /sys/class/rtc/rtc0/name)"\n'
        'echo "epoch=$(cat /sys/class/rtc/rtc0/since_epoch)"\n'
        'echo "now=$(date +%s)"',
    ).ok()
    uart = booted.value("uart")
    assert "uart:16550A port:000003F8 irq:4" in uart
    assert int(re.search(r"tx:(\d+)", uart)[1]) > 0  # type: ignore[index]
    assert booted.value("rtc").startswith("rtc_cmos")
    for clock in ("epoch", "now"):
        assert abs(int(booted.value(clock)) - time.time()) < BOOT_TIMEOUT


def test_clock_interrupts(boot: Boot) -> None:
    """An alarm two seconds ahead rings: rtc_cmos takes line 8."""
    booted = boot(
        "cd /sys/class/rtc/rtc0; echo +2 > wakealarm\n"
        'i=0; while [ -n "$(cat wakealarm)" ] && [ $i -lt 20 ]; do sleep 1; i=$((i+1)); done\n'
        'echo "left=$(cat wakealarm)."\n'
        "echo \"rings=$(awk '/rtc0/{print $2}' /proc/interrupts)\"",
    ).ok()
    assert booted.value("left") == "."
    assert int(booted.value("rings")) > 0


def machine(kernel: str, initramfs: Callable[[str], Path], script: str) -> Machine:
    return Machine(
        kernel=kernel,
        initrds=[str(initramfs(script))],
        append="quiet sysrq_always_enabled",
        memory="256M",
        serial="buffer",
        console="none",
        timeout=BOOT_TIMEOUT,
    )


def test_a_conversation(kernel: str, initramfs: Callable[[str], Path]) -> None:
    script = 'while read -r line && [ "$line" != end ]; do echo "got <$line>"; done'
    with machine(kernel, initramfs, script) as vm:
        vm.console.send("typed before the kernel began\n")
        vm.console.expect(UP, BOOT_TIMEOUT)
        count_boot()
        vm.console.expect("got <typed before the kernel began>", 30)
        for n in range(20):
            vm.console.send(f"line {n}{'x' * n}\n")
            vm.console.expect(f"got <line {n}{'x' * n}>", 30)
        vm.console.send("end\n")
        assert vm.wait().reason == "poweroff"


def test_bytes_in_bulk(kernel: str, initramfs: Callable[[str], Path]) -> None:
    """More than every buffer on the way, without a byte lost, changed or swapped."""
    data = os.urandom(50_000)
    script = f"stty raw -echo; echo ready; head -c {len(data)} | sha256sum; stty sane"
    with machine(kernel, initramfs, script) as vm:
        vm.console.expect("ready", BOOT_TIMEOUT)
        count_boot()
        vm.console.send(data, timeout=60)
        vm.console.expect(hashlib.sha256(data).hexdigest(), 60)
        assert vm.wait().reason == "poweroff"


def test_break_is_sysrq(kernel: str, initramfs: Callable[[str], Path]) -> None:
    with machine(kernel, initramfs, "read -r line") as vm:
        vm.console.expect(UP, BOOT_TIMEOUT)
        count_boot()
        vm.console.send_break()
        vm.console.send("h")
        vm.console.expect("sysrq: HELP", 30)
        vm.console.send("\n")
        assert vm.wait().reason == "poweroff"

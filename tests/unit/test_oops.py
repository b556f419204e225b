"""Consoles of kernels that failed, as they really print."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import oops

NO_ROOT = """\
[    0.901234] md: Waiting for all devices to be available before autodetect
[    0.912345] VFS: Cannot open root device "(null)" or unknown-block(0,0): error -6\r
[    0.913000] Please append a correct "root=" boot option; here are the available partitions:\r
[    0.914000] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\r
[    0.915000] CPU: 0 PID: 1 Comm: swapper/0 Not tainted 6.1.0-18-cloud-amd64 #1\r
[    0.916000] Call Trace:\r
[    0.917000]  <TASK>\r
[    0.918000]  dump_stack_lvl+0x44/0x5c\r
[    0.919000]  panic+0x118/0x2ed\r
[    0.920000]  </TASK>\r
[    0.921000] Kernel Offset: 0x13000000 from 0xffffffff81000000\r
[    0.922000] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs ]---\r
after
"""

WRONG_ROOT = """\
[    1.0] VFS: Cannot open root device "vdb" or unknown-block(0,0): error -6
[    1.1] Please append a correct "root=" boot option; here are the available partitions:
[    1.2] fe00         2097152 vda
[    1.3]  driver: virtio_blk
[    1.4] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)
"""

OOPS_THEN_PANIC = """\
[   10.000000][  T99] hello
[   12.345678][  T99] BUG: kernel NULL pointer dereference, address: 0000000000000000
[   12.345679][  T99] #PF: supervisor write access in kernel mode
[   12.345680][  T99] Oops: 0002 [#1] PREEMPT SMP NOPTI
[   12.345681][  T99] RIP: 0010:sysrq_handle_crash+0x16/0x20
[   12.345682][  T99] ---[ end trace 0000000000000000 ]---
[   12.345683][  T99] RIP: 0010:sysrq_handle_crash+0x16/0x20
[   12.345684][  T99] Kernel panic - not syncing: Fatal exception
[   12.345685][  T99] ---[ end Kernel panic - not syncing: Fatal exception ]---
"""

WARNING = """\
[    3.0] ------------[ cut here ]------------
[    3.1] WARNING: CPU: 1 PID: 77 at kernel/foo.c:12 foo+0x1/0x2
[    3.2] Modules linked in:
[    3.3] ---[ end trace 0000000000000000 ]---
[    3.4] fine again
"""

STALL = """\
[   60.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
[   60.1] rcu:     1-...0: (1 GPs behind) idle=0c4c/1/0x4000000000000000
[   60.2]  <TASK>
[   60.3]  </TASK>
[   61.0] normal
"""


def kinds(text: str) -> list[str]:
    return [r.kind for r in oops.scan(text)]


def test_no_root() -> None:
    (report,) = oops.scan(NO_ROOT)
    assert report.kind == "panic"
    assert report.title.startswith("Kernel panic - not syncing: VFS: Unable to mount root fs")
    assert "Cannot open root device" in report.lines[0]
    assert report.lines[-1].startswith("[    0.922000] ---[ end Kernel panic")
    assert "\r" not in report.text
    assert "give it an initrd (-i)" in (oops.guess(NO_ROOT) or "")


def test_wrong_root_is_told_from_no_disk() -> None:
    assert "sees disks" in (oops.guess(WRONG_ROOT) or "")


def test_oops_then_panic() -> None:
    first, second = oops.scan(OOPS_THEN_PANIC)
    assert (first.kind, len(first.lines)) == ("oops", 5)
    assert first.title == "BUG: kernel NULL pointer dereference, address: 0000000000000000"
    assert (second.kind, len(second.lines)) == ("panic", 2)
    assert oops.worst([first, second]) is second


def test_panic_inside_an_oops_is_its_own_report() -> None:
    text = OOPS_THEN_PANIC.replace("---[ end trace 0000000000000000 ]---", "no end")
    assert kinds(text) == ["oops", "panic"]


def test_warning_and_stall() -> None:
    (warning,) = oops.scan(WARNING)
    assert (warning.kind, len(warning.lines)) == ("warning", 4)
    (stall,) = oops.scan(STALL)
    assert (stall.kind, len(stall.lines)) == ("stall", 4)
    assert kinds(WARNING + STALL) == ["warning", "stall"]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("general protection fault, probably for non-canonical address 0x1: 0000 [#1]", "oops"),
        ("Oops: general protection fault, maybe for address 0x0: 0000 [#1] SMP", "oops"),
        ("kernel BUG at mm/slub.c:305!", "oops"),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]", "stall"),
        ("INFO: task foo:12 blocked for more than 120 seconds.", "stall"),
        ("BUG: sleeping function called from invalid context at x.c:1", "warning"),
        ("Out of memory: Killed process 77 (stress) total-vm:1kB", "warning"),
        ("PANIC: early exception 0x0d IP 10:ffffffff81000000 error 0 cr2 0x0", "panic"),
    ],
)
def test_heads(line: str, kind: str) -> None:
    assert kinds(f"boot\n[    1.000000] {line}\n") == [kind]
    assert kinds(f"boot\n{line}\n") == [kind]


@pytest.mark.parametrize(
    "line",
    [
        "traps: foo[1] general protection fault ip:1 sp:2 error:0",
        "systemd[1]: WARNING: nothing",
        "my program says Kernel panic - not syncing",
        "WARNING: apt does not have a stable CLI interface",
    ],
)
def test_what_is_no_report(line: str) -> None:
    assert kinds(f"[    1.000000] {line}\n{line}\n") == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Gave up waiting for root file system device.", "root="),
        ("ALERT!  /dev/sda1 does not exist.  Dropping to a shell!", "/dev/vda"),
        ("Kernel panic - not syncing: No working init found.", "rdinit="),
        ("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000000", "power off"),
        ("Kernel panic - not syncing: Attempted to kill init! exitcode=0x00007f00", "libraries"),
        ("Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b", "died"),
        ("Kernel panic - not syncing: System is deadlocked on memory", "-m"),
        ("Initramfs unpacking failed: write error", "-m"),
        ("Warning: unable to open an initial console.", "/dev/console"),
    ],
)
def test_guesses(text: str, part: str) -> None:
    assert part in (oops.guess(text) or "")


def test_no_guess_for_a_good_boot() -> None:
    assert oops.guess("[    0.0] Linux version 6.1\nlogin: ") is None
    assert oops.worst([]) is None


@given(st.lists(st.sampled_from([*NO_ROOT.split("\n"), *WARNING.split("\n"), "\x00\xff", ""])))
def test_any_order_of_lines(lines: list[str]) -> None:
    text = "\n".join(lines)
    reports = oops.scan(text)
    assert len(reports) <= 32
    assert all(r.kind in oops.KINDS and r.lines for r in reports)
    oops.guess(text)


def test_re_is_imported_late() -> None:
    import subprocess

    code = "import sys, vmm.oops, vmm.console, vmm.chario; print('re' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""What vmm run prints of a machine, and what a result is."""

from __future__ import annotations

import pytest

from vmm.cli import report
from vmm.errors import GuestLost, GuestPanic, GuestTimeout
from vmm.result import REASONS, RunResult


def test_the_table_of_exits() -> None:
    text = report.exits(
        [
            ("KVM_EXIT_IO", 0x3F8, True, 900, 0),
            ("KVM_EXIT_MMIO", 0xFEB00000, False, 75, 75),
            ("KVM_EXIT_HLT", 0, False, 25, 25),
        ]
    )
    lines = text.splitlines()
    assert lines[0] == "1000 exits, 100 answered by Python (10%)"
    assert lines[2].split() == ["900", "90%", "0%", "KVM_EXIT_IO", "write", "0x3f8"]
    assert lines[3].split() == ["75", "8%", "100%", "KVM_EXIT_MMIO", "read", "0xfeb00000"]
    assert lines[4].split() == ["25", "2%", "100%", "KVM_EXIT_HLT"]


def test_no_exits() -> None:
    assert report.exits([]).splitlines()[0] == "0 exits, 0 answered by Python (0%)"


def test_the_text_of_a_dry_run() -> None:
    facts = {
        "accel": "nested",
        "accel_reason": "no KVM",
        "cpus": 2,
        "cpu": "host",
        "ram": 1 << 30,
        "memory": [
            {"base": 0x100000, "size": 0x1000, "type": "ram"},
            {"base": 0, "size": 0x1000, "type": "reserved"},
        ],
        "devices": [
            {"name": "serial0", "bus": "pio", "base": 0x3F8, "size": 8, "interrupt": "GSI 4"}
        ],
        "command_line": "console=ttyS0",
        "boot": ["entry 0x1000000"],
        "serial": "stdio",
        "disks": [],
    }
    assert report._text(facts) == [
        "accel    nested (no KVM)",
        "cpu      2 x host",
        "memory   1G",
        "memory map",
        "  0x000000000000-0x000000000fff  reserved",
        "  0x000000100000-0x000000100fff  ram",
        "devices",
        "  pio  0x0000000003f8-0x0000000003ff  serial0  GSI 4",
        "command line",
        "  console=ttyS0",
        "boot",
        "  entry 0x1000000",
        "serial   stdio",
    ]


@pytest.mark.parametrize(
    ("reason", "error"),
    [("panic", GuestPanic), ("lost", GuestLost), ("timeout", GuestTimeout)],
)
def test_check_raises_for_a_bad_end(reason: str, error: type[Exception]) -> None:
    result = RunResult(255, reason, console="tail", message="It is gone.")
    with pytest.raises(error, match=r"It is gone\.") as caught:
        result.check()
    assert getattr(caught.value, "console", None) == "tail"
    assert not result.ok


@pytest.mark.parametrize("reason", sorted(set(REASONS) - {"panic", "watchdog", "lost", "timeout"}))
def test_check_gives_the_result_for_any_other_end(reason: str) -> None:
    result = RunResult(0, reason)
    assert result.check() is result
    assert result.ok
    assert result.clocks == {}
    assert reason in repr(result)

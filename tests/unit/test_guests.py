"""The payload guests' sources and their table belong together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from vmm.result import REASONS

GUESTS = Path(__file__).resolve().parents[2] / "guests"
TABLE = tomllib.loads((GUESTS / "payloads.toml").read_text())
KEYS = {
    "append", "boot", "cpus", "devices", "disk", "exit", "file", "memory", "modules", "output",
    "pmem", "reason", "timeout", "transport",
}  # fmt: skip


def sources() -> set[str]:
    shared = re.search(r"^SHARED := (.*)$", (GUESTS / "Makefile").read_text(), re.M)
    assert shared
    return {p.stem for p in (GUESTS / "payload").glob("*.S")} - set(shared[1].split())


def test_every_guest_has_a_stanza() -> None:
    assert {row["file"] for row in TABLE.values()} == sources()


@pytest.mark.parametrize("name", TABLE)
def test_a_stanza_is_complete(name: str) -> None:
    row = TABLE[name]
    assert set(row) <= KEYS
    assert {"file", "memory", "output", "timeout"} <= set(row)
    assert ("exit" in row) == (row.get("reason", "debug-exit") == "debug-exit")
    assert row.get("reason", "debug-exit") in REASONS


@pytest.mark.parametrize("name", sorted(sources()))
def test_a_source_says_what_it_does(name: str) -> None:
    head = (GUESTS / "payload" / f"{name}.S").read_text().split("*/")[0]
    assert head.startswith(f"/*\n * {name}: ")
    assert "\n * Prints:\t" in head
    assert "\n * Exit value:\t" in head or "\n * Ends:\t" in head

"""The payload guests on /dev/kvm: each does one thing and ends as guests/payloads.toml says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vmm import Machine
from vmm.catalog import parse
from vmm.values import parse_size

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "guests"
TABLE: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "guests" / "payloads.toml").read_text())

pytestmark = pytest.mark.usefixtures("kvm")


def zeros(path: Path, size: str) -> Path:
    with path.open("wb") as file:
        file.truncate(parse_size(size))
    return path


def options(row: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A stanza as keywords of Machine."""
    image = BUILT / row["file"]
    assert image.exists(), f"{image} is not built; run 'make guests'"
    modules = []
    for nr, text in enumerate(row.get("modules", [])):
        modules.append(tmp_path / f"module{nr}")
        modules[nr].write_text(text)
    disks = [zeros(tmp_path / "disk.img", row["disk"])] if "disk" in row else []
    devices = [parse(text, str(ROOT)) for text in row.get("devices", [])]
    if "pmem" in row:
        devices.append(parse(f"pmem,{zeros(tmp_path / 'pmem.img', row['pmem'])}"))
    return {
        "kernel": image,
        "disks": disks,
        "boot": row.get("boot", "auto"),
        "memory": row["memory"],
        "cpus": row.get("cpus", 1),
        "append": row.get("append", ""),
        "initrds": modules,
        "transport": row.get("transport", "pci"),
        "devices": devices,
        "timeout": row["timeout"],
        "testdev": True,
    }


@pytest.mark.parametrize("name", TABLE)
def test_payload(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    result = Machine(**options(row, tmp_path)).run()
    lines = result.console.splitlines()
    report = f"{result!r}\n{result.console}\n{result.diagnosis}"
    assert result.reason == row.get("reason", "debug-exit"), report
    if "exit" in row:
        assert result.status == row["exit"] << 1 | 1, report
    assert len(lines) == len(row["output"]), report
    for line, pattern in zip(lines, row["output"], strict=True):
        assert re.fullmatch(pattern, line), f"{line!r} is not {pattern!r}\n{report}"

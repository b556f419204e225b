"""Parsers of values: what they print they read, and nothing else but ValueError comes out."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm import values
from vmm.config import MachineConfig
from vmm.disk import CACHES, POLICIES, DiskSpec, parse_disk
from vmm.errors import ConfigError
from vmm.settings import machine_settings

MIB = 1 << 20
paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
serials = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
rates = st.integers(0, 1 << 50)
disks = st.builds(
    DiskSpec,
    paths,
    read_only=st.booleans(),
    serial=serials,
    cache=st.sampled_from(CACHES),
    queues=st.integers(0, 64),
    block_size=st.sampled_from([0, 512, 4096]),
    discard=st.booleans(),
    werror=st.sampled_from(POLICIES),
    rerror=st.sampled_from(POLICIES[:3]),
    bps=rates,
    bps_burst=rates,
    iops=rates,
    iops_burst=rates,
)


@given(st.integers(0, 1 << 60))
def test_sizes_round_trip(size: int) -> None:
    assert values.parse_size(values.format_size(size)) == size


@given(st.integers(0, 1 << 20), st.sampled_from("KMGT"), st.sampled_from(["", "B", "iB", "b"]))
def test_sizes_with_units(number: int, unit: str, suffix: str) -> None:
    expected = number * values.UNITS[unit]
    assert values.parse_size(f"{number}{unit}{suffix}") == expected
    assert values.parse_size(f" {number}{unit.lower()}{suffix}") == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512 * MIB), ("1.5G", 1536 * MIB), ("0.5", MIB // 2), ("4096B", 4096), ("1.5K", 1536)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "1X",
        "-1",
        "+1",
        "1e3",
        "1.",
        ".5",
        "0x10",
        "1.0001K",
        "1iB",
        "1 2",
        "٣",
        "9" * 5000,
    ],
)
def test_not_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        values.parse_size(text)


@given(st.floats(0, 1e9))
def test_durations_round_trip(seconds: float) -> None:
    again = values.parse_duration(values.format_duration(seconds))
    assert math.isclose(again, seconds, abs_tol=1e-9, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), ("250ms", 0.25)]
)
def test_durations_as_people_write_them(text: str, seconds: float) -> None:
    assert values.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "nan", "inf", "-1", "5 minutes", "1d", "1h30m", "ms"])
def test_not_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        values.parse_duration(text)


@given(disks)
def test_disks_round_trip(disk: DiskSpec) -> None:
    again = parse_disk(str(disk))
    assert again == disk
    assert (again.path, again.keywords()) == (disk.path, disk.keywords())


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for row in machine_settings():
        if row.kind == "value":
            with contextlib.suppress(ConfigError):
                assert isinstance(row.read(text), row.types)


@given(
    st.lists(disks, max_size=3),
    st.lists(st.text("abc =-\"'", max_size=5), max_size=3),
    st.integers(256, 1 << 30),
    st.booleans(),
)
def test_a_config_survives_its_keywords(
    disks: list[DiskSpec], append: list[str], pages: int, rng: bool
) -> None:
    config = MachineConfig(disks=disks, append=append, memory=pages * 4096, rng=rng)
    assert MachineConfig(**config.as_dict()) == config

"""Valid chains, then 0 to 3 named mutations: native/ring.h and its Python twin must say the same
about each, and neither may touch a byte it does not own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio_mutations import MUTATIONS, Layout
from tests.virtio_ring import EVENT_IDX, INDIRECT, QUEUES, RINGS, DriverRing, device_side
from vmm.memory import GuestMemory

SIZE = 16
RAM = 0x10000
HIGH = 1 << 32
TABLES = 0x4000
BUFFERS = 0x8000


CHAIN = st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.booleans(), st.lists(st.integers(1, 700), max_size=6)
)
CASE = st.fixed_dictionaries(
    {
        "features": st.sampled_from([0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX]),
        "form": st.sampled_from(sorted(RINGS)),
        "at": st.sampled_from([0, 5, 29, 0xFFFA]),
        "event": st.one_of(st.none(), st.integers(0, 20)),
        "chains": st.lists(CHAIN, min_size=1, max_size=8),
        "mutations": st.lists(
            st.tuples(
                st.sampled_from(sorted(MUTATIONS)), st.integers(0, 60), st.integers(0, 0xFFFF)
            ),
            max_size=3,
        ),
        "hold": st.integers(0, 3),
    }
)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    m = GuestMemory([(0, RAM), (HIGH, RAM)])
    yield m
    m.close()


def build(memory: GuestMemory, case: dict[str, Any]) -> DriverRing:
    memory.write(0, bytes(RAM))
    ring = RINGS[case["form"]](memory, SIZE, at=case["at"])
    if case["event"] is not None:
        ring.want_interrupt_after(case["event"])
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for reads, writes, indirect, sizes in case["chains"]:
        sizes = (sizes + [8] * 6)[: reads + writes]
        if not sizes or len(ring.free) < len(sizes):
            continue
        parts: list[tuple[int, int]] = []
        for size in sizes:
            parts.append((at if len(parts) % 3 else HIGH + at, size))
            at += size
        use = table if indirect and case["features"] & INDIRECT else None
        lay.chain(parts[:reads], parts[reads:], indirect=use)
        table += 16 * len(sizes)
    for name, which, n in case["mutations"]:
        lay.mutate(name, which, n)
    return ring


def run(kind: str, memory: GuestMemory, case: dict[str, Any]) -> tuple[list[Any], bytes]:
    """What a device that fills every writable buffer sees and leaves behind."""
    ring = build(memory, case)
    q = device_side(kind, ring, case["features"])
    before = memory.read(0, RAM) + memory.read(HIGH, RAM)
    log: list[Any] = [q.enable_kicks()]
    held = []
    for _ in range(3 * SIZE):
        chain = q.pop()
        log.append(q.verdict)
        if chain is None:
            break
        log.append((chain.head, chain.readable, chain.writable, chain.read_len, chain.write_len))
        for gpa, size in chain.readable + chain.writable:
            assert memory.contains(gpa, size)
        held.append(chain)
        if len(held) > case["hold"]:
            q.push(held[0], held.pop(0).write_len)
            log.append(q.should_notify())
    else:
        raise AssertionError("more chains than a queue can hold")
    assert q.inflight == len(held)
    for chain in held:
        q.push(chain, 1 << 33)
    if held:
        q.push(held[0], 1)  # a head completes once
    q.disable_kicks()
    log += [q.broken, q.inflight, q.should_notify()]
    after = memory.read(0, RAM) + memory.read(HIGH, RAM)
    rest = bytearray(after)
    for gpa, size in ring.device_writes:
        rest[gpa : gpa + size] = before[gpa : gpa + size]
    assert rest == before, "something was written outside the used ring"
    return log, after


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(case=CASE)
def test_both_agree(memory: GuestMemory, case: dict[str, Any]) -> None:
    assert run("c", memory, case) == run("python", memory, case)


@settings(deadline=None, max_examples=200)
@given(
    form=st.sampled_from(sorted(RINGS)),
    desc=st.integers(0, (1 << 64) - 1),
    avail=st.integers(0, (1 << 64) - 1),
    used=st.integers(0, (1 << 64) - 1),
    size=st.integers(0, 0xFFFF),
    near=st.tuples(*[st.sampled_from([None, 0, RAM, HIGH, HIGH + RAM, 1 << 63])] * 3),
)
def test_both_agree_on_places(
    memory: GuestMemory,
    form: str,
    desc: int,
    avail: int,
    used: int,
    size: int,
    near: tuple[int | None, int | None, int | None],
) -> None:
    """Addresses near the edges of RAM, and anywhere: the same queues are refused."""
    parts = [
        (edge - 0x200 + value % 0x400) & (1 << 64) - 1 if edge is not None else value
        for edge, value in zip(near, (desc, avail, used), strict=True)
    ]
    aligned = [p & -a for p, a in zip(parts, (16, 4, 4), strict=True)]
    for places in (parts, aligned):
        for length in (size, 1 << size % 17):
            if length > 0xFFFF:
                continue
            said = []
            for kind in ("c", "python"):
                try:
                    QUEUES[kind](memory, length, *places, RINGS[form].FEATURES)
                    said.append("taken")
                except ValueError:
                    said.append("refused")
            assert said[0] == said[1]

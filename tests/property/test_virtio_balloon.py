"""Chains valid by construction, then 0 to 3 named mutations, at each queue of a balloon: it
answers or asks for a reset, takes no page that no chain named, and works afterwards."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.property.test_virtio_devices import (
    BUFFERS,
    END,
    NAMES,
    TABLES,
    Target,
    foresee,
    wait_for_answer,
)
from tests.virtio_mutations import Layout
from tests.virtio_rig import HIGH, RAM
from tests.virtio_ring import DriverRing
from vmm.devices.virtio.balloon import PAGE, Balloon
from vmm.devices.virtio.queue import Chain

INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
#: A page beyond the driver's own things, and what else a driver may name.
PFN = st.one_of(
    st.integers(END >> 12, (RAM >> 12) - 1),
    st.integers((HIGH >> 12) - 2, (HIGH >> 12) + 258),
    st.sampled_from([RAM >> 12, 0xFEE00, 0xFFFFFFFF]),
)
FREE = st.tuples(st.integers(END, RAM - 1), st.integers(1, 3 * PAGE))
CHAIN = st.fixed_dictionaries(
    {
        "pfns": st.lists(PFN, max_size=20),
        "cut": st.integers(0, 20),
        "free": st.lists(
            st.tuples(st.integers(END, RAM - 1), st.integers(1, 3 * PAGE)), max_size=3
        ),
        "indirect": st.booleans(),
    }
)
CASE = st.fixed_dictionaries(
    {
        "chains": st.lists(CHAIN, min_size=1, max_size=5),
        "mutations": st.lists(
            st.tuples(st.sampled_from(NAMES), st.integers(0, 60), st.integers(0, 0xFFFF)),
            max_size=3,
        ),
    }
)


@pytest.fixture(
    scope="module", params=range(5), ids=["inflate", "deflate", "stats", "hint", "report"]
)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = Target(Balloon(), request.param)
    yield made
    made.close()


def build(target: Target, case: dict[str, Any]) -> DriverRing:
    ring = target.ring()
    for gpa, size in ((END, RAM - END), (HIGH, 1 << 20)):
        ring.memory.write(gpa, b"\xa5" * size)
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for chain in case["chains"]:
        data = struct.pack(f"<{len(chain['pfns'])}I", *chain["pfns"])
        writable = [(gpa, min(size, RAM - gpa)) for gpa, size in chain["free"]]
        readable = [(at, len(data))] if data else []
        if 0 < chain["cut"] < len(data):
            readable = [(at, chain["cut"]), (at + chain["cut"], len(data) - chain["cut"])]
        ring.memory.write(at, data)
        at += 256
        parts = len(readable) + len(writable)
        if not parts:
            continue
        if len(ring.free) < parts:
            break
        lay.chain(readable, writable, indirect=table if chain["indirect"] else None)
        table += 0x100
    for name, which, n in case["mutations"]:
        lay.mutate(name, which, n)
    return ring


def may_go(queue: int, chains: list[Chain]) -> set[int]:
    """The pages that chains give away, by their numbers."""
    pages: set[int] = set()
    for chain in chains:
        if queue == INFLATE:
            data = chain.read(1 << 20)
            pages.update(n for (n,) in struct.iter_unpack("<I", data[: len(data) & ~3]))
        if queue == REPORT:
            for gpa, size in chain.writable:
                pages.update(range(-(-gpa // PAGE), (gpa + size) // PAGE))
    return pages


def check_memory(target: Target, ring: DriverRing, pages: set[int]) -> None:
    """Given pages are as before or zeros, all others are as before, but for the used ring."""
    zeros = bytes(PAGE)
    for r in ring.memory.ranges:
        now, before = bytearray(ring.memory.read(r.gpa, r.size)), target.shadow.read(r.gpa, r.size)
        if r.gpa <= ring.used < r.gpa + r.size:
            used = slice(ring.used - r.gpa, ring.end - r.gpa)
            now[used] = before[used]
        if now == before:
            continue
        for at in range(0, r.size, PAGE):
            page = now[at : at + PAGE]
            if page != before[at : at + PAGE]:
                assert (r.gpa + at) >> 12 in pages, "the device took what it was not given"
                assert page == zeros


def check_alive(target: Target) -> None:
    ring = target.ring()
    ring.memory.write(BUFFERS, struct.pack("<II", END >> 12, 0xFFFFFFFF))
    given_pages = target.queue == REPORT
    head = ring.add([], [(END, PAGE)]) if given_pages else ring.add([(BUFFERS, 8)], [])
    target.start(ring)
    if target.queue != STATS:  # which keeps what it is given
        assert not wait_for_answer(target, ring)
        assert ring.reap() == [(head, 0)]


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=CASE)
def test_whatever_the_driver_offers(target: Target, case: dict[str, Any]) -> None:
    ring = build(target, case)
    chains, verdict = foresee(target, ring)
    pages = may_go(target.queue, chains)
    # A driver that gives its rings away: allowed, but nothing can be said about what comes next.
    assume(not any(page < END >> 12 for page in pages))
    if target.queue != INFLATE and target.queue != REPORT:
        assert not pages
    target.start(ring)
    if target.queue == STATS:
        target.rig.settle()
    else:
        broken = wait_for_answer(target, ring)
        if verdict not in ("empty", "chain"):
            assert broken, f"the queue is broken ({verdict}) and the device did not say so"
    target.rig.regs.status = 0  # whatever is in flight ends here
    check_memory(target, ring, pages)
    check_alive(target)

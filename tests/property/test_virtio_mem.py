"""virtio-mem against a model of a few lines, and whatever chains a driver offers it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.property.test_virtio_devices import (
    BUFFERS,
    NAMES,
    TABLES,
    Target,
    check_memory,
    foresee,
    wait_for_answer,
)
from tests.unit.test_virtio_mem import ACK, BASE, BLOCK, ERROR, NACK, MemRig, Placed
from tests.virtio_mutations import Layout
from tests.virtio_ring import DriverRing

BLOCKS = 16
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)

ADDRESS = st.one_of(
    st.integers(-1, BLOCKS + 1).map(lambda n: BASE + n * BLOCK),
    st.sampled_from([BASE + 1, BASE - 1, 0, (1 << 64) - BLOCK]),
)
STEP = st.tuples(
    st.sampled_from([PLUG, PLUG, PLUG, UNPLUG, UNPLUG, UNPLUG_ALL, STATE, STATE, 4]),
    ADDRESS,
    st.one_of(st.integers(0, 4), st.sampled_from([BLOCKS, 0xFFFF])),
    st.one_of(st.none(), st.none(), st.integers(0, BLOCKS)),
)


class Model:
    """virtio-v1.3 §5.15.6, of a region that is small enough to be usable as a whole."""

    def __init__(self) -> None:
        self.plugged: set[int] = set()
        self.requested = self.usable = 0

    def request(self, blocks: int) -> None:
        self.requested = blocks
        self.usable = max(self.usable, BLOCKS if blocks else 0)

    def ask(self, kind: int, addr: int, nr: int) -> tuple[int, int]:
        if kind == UNPLUG_ALL:
            self.plugged.clear()
            self.usable = BLOCKS if self.requested else 0
            return ACK, 0
        first, odd = divmod(addr - BASE, BLOCK)
        wanted = set(range(first, first + nr))
        if kind > STATE or odd or not nr or first < 0 or first + nr > self.usable:
            return ERROR, 0
        there = wanted & self.plugged
        if kind == STATE:
            return ACK, 0 if there == wanted else 2 if there else 1
        if kind == PLUG:
            if there:
                return ERROR, 0
            if len(self.plugged) + nr > self.requested:
                return NACK, 0
            self.plugged |= wanted
            return ACK, 0
        if there != wanted:
            return ERROR, 0
        self.plugged -= wanted
        return ACK, 0


@pytest.fixture(scope="module")
def rig() -> Iterator[MemRig]:
    made = MemRig(Placed(BLOCKS * BLOCK), "mmio")
    made.driver.start()
    yield made
    made.close()


@settings(deadline=None, max_examples=100)
@given(steps=st.lists(STEP, min_size=1, max_size=20))
def test_as_the_model_says(rig: MemRig, steps: list[tuple[int, int, int, int | None]]) -> None:
    rig.driver.next = 0x10_0000  # the buffers of the last example are free again
    rig.device.set_requested(0)
    rig.ask(UNPLUG_ALL)
    model = Model()
    for kind, addr, nr, request in steps:
        if request is not None:
            rig.device.set_requested(request * BLOCK)
            model.request(request)
        assert rig.ask_state(kind, nr=nr, addr=addr) == model.ask(kind, addr, nr)
        assert rig.sizes == (model.usable, len(model.plugged), model.requested)


CHAIN = st.tuples(
    st.integers(0, 5),
    ADDRESS,
    st.integers(0, 20),
    st.sampled_from([24, 24, 24, 23, 30, 0]),
    st.sampled_from([10, 10, 10, 9, 64, 0]),
    st.booleans(),
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


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    made = Target(Placed(BLOCKS * BLOCK, requested=BLOCKS * BLOCK), 0)
    yield made
    made.close()


def build(target: Target, case: dict[str, Any]) -> DriverRing:
    ring = target.ring()
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for kind, addr, nr, asked, room, indirect in case["chains"]:
        request = struct.pack("<H6xQH6x", kind, addr & (1 << 64) - 1, nr).ljust(30, b"\0")
        ring.memory.write(at, request)
        readable = [(at, asked)] if asked else []
        writable = [(at + 64, room)] if room else []
        at += 256
        if readable or writable:
            lay.chain(readable, writable, indirect=table if indirect else None)
        table += 0x100
    for name, which, n in case["mutations"]:
        lay.mutate(name, which, n)
    return ring


@settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=CASE)
def test_whatever_the_driver_offers(target: Target, case: dict[str, Any]) -> None:
    ring = build(target, case)
    chains, verdict = foresee(target, ring)
    target.start(ring)
    broken = wait_for_answer(target, ring)
    target.rig.regs.status = 0
    if verdict not in ("empty", "chain"):
        assert broken, f"the queue is broken ({verdict}) and the device did not say so"
    check_memory(target, ring, chains)
    ring = target.ring()
    ring.memory.write(BUFFERS, struct.pack("<H6xQH6x", UNPLUG_ALL, 0, 0))
    head = ring.add([(BUFFERS, 24)], [(BUFFERS + 64, 10)])
    target.start(ring)
    assert not wait_for_answer(target, ring)
    assert ring.reap() == [(head, 10)]
    assert ring.memory.read(BUFFERS + 64, 10) == bytes(10)

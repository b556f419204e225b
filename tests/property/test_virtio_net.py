"""Chains for each of a network card's queues, valid by construction, then mutated: the card touches
only what it was given, says when a queue is broken, and works after a reset. A peer that sends
anything does it no more harm."""

from __future__ import annotations

import select
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio_mock import DRIVER_OK, FEATURES_OK, NEEDS_RESET
from tests.virtio_mutations import MUTATIONS, Layout
from tests.virtio_net import CTRL, HDR, MRG_RXBUF, PLAIN, RX, TX, Card, frame
from tests.virtio_ring import INDIRECT, DriverRing, device_side
from vmm.devices.virtio.queue import Chain
from vmm.memory import GuestMemory

SIZE = 16
TABLES, BUFFERS, END = 0x4000, 0x1_0000, 0x8_0000
#: The buffers would be the ring itself: allowed, but nothing can be said about what comes next.
NAMES = sorted(set(MUTATIONS) - {"addr_ring"})

HEADER = st.one_of(
    st.just(bytes(HDR)),
    st.just(bytes(HDR)),
    st.binary(min_size=HDR, max_size=HDR),
)
COMMAND = st.tuples(
    st.integers(0, 6), st.integers(0, 3), st.one_of(st.binary(max_size=24), st.just(bytes(8)))
).map(lambda c: bytes(c[:2]) + c[2])
CHAIN = st.fixed_dictionaries(
    {
        "header": HEADER,
        "command": COMMAND,
        "size": st.sampled_from([0, 13, 14, 60, 500, 1514, 9000]),
        "cuts": st.lists(st.integers(1, 60), max_size=3),
        "indirect": st.booleans(),
    }
)
CASE = st.fixed_dictionaries(
    {
        "chains": st.lists(CHAIN, min_size=1, max_size=5),
        "frames": st.lists(st.sampled_from([13, 14, 60, 1514, 9000, 20000]), max_size=3),
        "mergeable": st.booleans(),
        "mutations": st.lists(
            st.tuples(st.sampled_from(NAMES), st.integers(0, 60), st.integers(0, 0xFFFF)),
            max_size=3,
        ),
    }
)


class Target:
    """One queue of one card that lives through all examples."""

    def __init__(self, queue: int, kind: str) -> None:
        self.card = Card(kind)
        self.queue = queue
        self.shadow = GuestMemory([(r.gpa, r.size) for r in self.card.memory.ranges])

    def ring(self, wanted: int = (1 << 64) - 1) -> DriverRing:
        """A queue of SIZE at the usual place, which no device looks at yet."""
        self.card.driver.reset()
        self.card.driver.negotiate(wanted & ~(1 << 34))
        self.card.memory.write(0, bytes(END))
        return DriverRing(self.card.memory, SIZE)

    def start(self, ring: DriverRing) -> None:
        """From here on the card serves it."""
        regs = self.card.regs
        regs.set_queue(self.queue, SIZE, ring.desc, ring.avail, ring.used)
        assert regs.enable(self.queue)
        regs.status = 3 | FEATURES_OK | DRIVER_OK
        regs.notify(self.queue)
        self.card.settle_all()

    def empty_peer(self) -> int:
        """Messages or bytes that the card sent."""
        count = 0
        while select.select([self.card.peer], [], [], 0)[0]:
            got = self.card.peer.recv(1 << 17)
            count += len(got) if self.card.kind == "stream" else 1
        return count

    def close(self) -> None:
        self.card.close()
        self.shadow.close()


@pytest.fixture(
    scope="module",
    params=[(RX, "seq"), (RX, "stream"), (TX, "seq"), (TX, "stream"), (CTRL, "seq")],
    ids=["rx-packet", "rx-stream", "tx-packet", "tx-stream", "ctrl"],
)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    made = Target(*request.param)
    yield made
    made.close()


def pieces(at: int, size: int, cuts: list[int]) -> list[tuple[int, int]]:
    """A range cut into buffers."""
    found = []
    for cut in cuts:
        if size > cut:
            found.append((at, cut))
            at, size = at + cut, size - cut
    return [*found, (at, size)]


def build(target: Target, case: dict[str, Any]) -> DriverRing:
    ring = target.ring(PLAIN | INDIRECT if case["mergeable"] else PLAIN & ~MRG_RXBUF | INDIRECT)
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for chain in case["chains"]:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        if target.queue == RX:
            writable = pieces(at, HDR + chain["size"], chain["cuts"])
        elif target.queue == TX:
            data = chain["header"] + frame(chain["size"])
            ring.memory.write(at, data)
            readable = pieces(at, len(data), chain["cuts"])
        else:
            ring.memory.write(at, chain["command"])
            readable = pieces(at, len(chain["command"]), chain["cuts"])
            writable = [(at + 64, 1)]
        at += 0x4000
        if len(ring.free) < len(readable) + len(writable):
            break
        lay.chain(readable, writable, indirect=table if chain["indirect"] else None)
        table += 0x100
    for name, which, n in case["mutations"]:
        lay.mutate(name, which, n)
    return ring


def foresee(target: Target, ring: DriverRing) -> tuple[list[Chain], str]:
    """What the Python twin takes from a copy of the memory, completing each chain at once."""
    for r in ring.memory.ranges:
        target.shadow.write(r.gpa, ring.memory.view(r.gpa, r.size))
    mirror = DriverRing.__new__(DriverRing)
    mirror.__dict__.update(ring.__dict__)
    mirror.memory = target.shadow
    mirror.avail_idx = mirror.used_idx = 0
    q = device_side("python", mirror, INDIRECT)
    chains = []
    while (chain := q.pop()) is not None:
        chains.append(chain)
        q.push(chain, 0)
    return chains, q.verdict


def check_memory(target: Target, ring: DriverRing, chains: list[Chain]) -> None:
    """Nothing changed but the used ring and what was writable."""
    allowed = [(ring.used, ring.end - ring.used)]
    allowed += [buffer for chain in chains for buffer in chain.writable]
    for r in ring.memory.ranges:
        now, before = bytearray(ring.memory.read(r.gpa, r.size)), target.shadow.read(r.gpa, r.size)
        for gpa, size in allowed:
            if r.gpa <= gpa < r.gpa + r.size:
                at = gpa - r.gpa
                now[at : at + size] = before[at : at + size]
        assert now == before, "the card wrote where it was given nothing to write"


def check_alive(target: Target) -> None:
    """After a reset each queue does its plain work."""
    card = target.card
    card.driver.reset()
    card.memory.write(END, bytes(0x10_0000))  # where the mock's rings come to lie
    card.driver.next = END
    card.driver.start()
    target.empty_peer()
    sent = frame(100)
    card.send(sent)
    got = b""
    while got != sent:  # frames of the example may come first
        card.offer(70000)
        got = card.received()[1]
    card.transmit(sent)
    assert card.recv() == sent
    assert card.command(0, 0, b"\1") == 0
    card.driver.reset()


@settings(
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=CASE)
def test_whatever_the_driver_offers(target: Target, case: dict[str, Any]) -> None:
    card = target.card
    ring = build(target, case)
    chains, verdict = foresee(target, ring)
    if target.queue == RX:
        for size in case["frames"]:
            card.send(frame(size))
    target.start(ring)
    broken = bool(card.regs.status & NEEDS_RESET)
    card.regs.status = 0
    if verdict not in ("empty", "chain") and target.queue != RX:
        assert broken, f"the queue is broken ({verdict}) and the card did not say so"
    room = {chain.head: chain.write_len for chain in chains}
    count = ring.memory.read_int(ring.used + 2, 2)
    assert count <= len(chains)
    for i in range(count):
        entry = ring.used + 4 + 8 * (i % SIZE)
        head, written = struct.unpack("<II", ring.memory.read(entry, 8))
        assert written <= room[head]
    check_memory(target, ring, chains)
    check_alive(target)


@settings(deadline=None, max_examples=60)
@given(
    pieces=st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.sampled_from([14, 60, 1514]).map(lambda n: struct.pack(">I", n) + bytes(n)),
        ),
        max_size=12,
    )
)
def test_whatever_the_peer_sends(pieces: list[bytes]) -> None:
    """A stream of anything: frames as far as it makes sense, then the link is down or waits."""
    card = Card("stream")
    try:
        card.driver.start()
        card.offer(70000, count=20)
        raw = b"".join(pieces)
        expect, at, alive = [], 0, True
        while len(raw) - at >= 4:
            size = struct.unpack(">I", raw[at : at + 4])[0]
            if size > 65536 + 64:
                alive = False
                break
            if len(raw) - at - 4 < size:
                break
            if size >= 14:
                expect.append(raw[at + 4 : at + 4 + size])
            at += 4 + size
        for piece in pieces:
            if piece:
                card.peer.sendall(piece)
        assert [card.received()[1] for _ in expect[:20]] == expect[:20]
        card.settle_all()
        assert card.net.link == alive
        assert not card.broken
    finally:
        card.close()

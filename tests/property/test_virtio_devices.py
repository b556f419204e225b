"""Requests valid by construction, then 0 to 3 named mutations, at whole devices. Whatever comes,
the device answers or asks for a reset, touches only what it was given, and works afterwards."""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio_mock import DRIVER_OK, FEATURES_OK, NEEDS_RESET
from tests.virtio_mutations import MUTATIONS, Layout
from tests.virtio_rig import Rig
from tests.virtio_ring import INDIRECT, DriverRing, device_side
from vmm.chario import Stream
from vmm.devices.virtio.blk import Blk
from vmm.devices.virtio.console import Console
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import Chain
from vmm.devices.virtio.rng import Rng
from vmm.memory import GuestMemory

SIZE = 16
SECTORS = 256
#: Headers come before all that is written: a buffer made longer cannot reach them.
TABLES, HEADERS, BUFFERS, END = 0x4000, 0x8000, 0x1_0000, 0x8_0000
#: The buffers would be the ring itself, which the device then fills while it reads it: allowed,
#: but nothing can be said about what comes next.
NAMES = sorted(set(MUTATIONS) - {"addr_ring"})

REQUEST = st.tuples(
    st.sampled_from([0, 0, 0, 1, 1, 1, 4, 8, 2, 11, 13, 13, 0xFFFFFFFF]),
    st.one_of(st.integers(0, SECTORS + 1), st.integers(0, (1 << 64) - 1)),
    st.sampled_from([512, 512, 1024, 4096, 1, 511, 0]),
    st.booleans(),
    st.integers(0, 20),
)
CASE = st.fixed_dictionaries(
    {
        "requests": st.lists(REQUEST, min_size=1, max_size=5),
        "mutations": st.lists(
            st.tuples(st.sampled_from(NAMES), st.integers(0, 60), st.integers(0, 0xFFFF)),
            max_size=3,
        ),
    }
)


class Target:
    """One device that lives through all examples, and a second memory for the oracle."""

    def __init__(self, device: VirtioDevice, queue: int, image: Path | None = None) -> None:
        self.rig = Rig(device, "mmio")
        self.queue = queue
        self.image = image
        self.shadow = GuestMemory([(r.gpa, r.size) for r in self.rig.memory.ranges])

    def ring(self) -> DriverRing:
        """A queue of SIZE at the usual place, which no device looks at yet."""
        self.rig.driver.reset()
        self.rig.driver.negotiate()
        self.rig.memory.write(0, bytes(END))
        return DriverRing(self.rig.memory, SIZE)

    def start(self, ring: DriverRing) -> None:
        """From here on the device serves it."""
        self.rig.regs.set_queue(self.queue, SIZE, ring.desc, ring.avail, ring.used)
        assert self.rig.regs.enable(self.queue)
        self.rig.regs.status = 3 | FEATURES_OK | DRIVER_OK
        self.rig.regs.notify(self.queue)

    def close(self) -> None:
        self.rig.close()
        self.shadow.close()


def pattern(sector: int) -> bytes:
    return struct.pack("<Q", sector) * 64


@pytest.fixture(scope="module", params=["blk-threads", "blk-uring", "blk-queues", "rng", "console"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    image = tmp_path_factory.mktemp("disk") / "image"
    image.write_bytes(b"".join(map(pattern, range(SECTORS))))
    out = Stream(65536)
    made = {
        "blk-threads": lambda: Target(Blk(str(image), uring=False), 0, image),
        "blk-uring": lambda: Target(Blk(str(image)), 0, image),
        "blk-queues": lambda: Target(Blk(str(image), queues=4, cache="none"), 2, image),
        "rng": lambda: Target(Rng(), 0),
        "console": lambda: Target(Console(out), 1),
    }[request.param]()
    yield made
    made.close()
    out.close()


def build(target: Target, case: dict[str, Any]) -> DriverRing:
    """Disk requests serve every device: to a console they are text, to an entropy source room."""
    ring = target.ring()
    lay = Layout(ring)
    at, table, header = BUFFERS, TABLES, HEADERS
    for kind, sector, size, indirect, cut in case["requests"]:
        header += 16
        if kind in (11, 13):  # discard, write zeroes: up to three segments, the last one cut short
            count = min(size, 2 * SECTORS)
            segments = struct.pack("<QII", sector, count, cut == 1) * (1 + cut % 3)
            segments = segments[: len(segments) - (cut == 7)]
            ring.memory.write(at, segments)
            size = len(segments)
        data, status = at, at + size
        at += size + 16
        ring.memory.write(header, struct.pack("<IIQ", kind, 0, sector))
        readable = (
            [(header, 16)] if not cut or cut > 15 else [(header, cut), (header + cut, 16 - cut)]
        )
        writable = [(status, 1)]
        if size and kind in (1, 11, 13):
            readable.append((data, size))
        elif size:
            writable.insert(0, (data, size))
        if isinstance(target.rig.device, Rng):
            readable = []
        if len(ring.free) < len(readable) + len(writable):
            break
        lay.chain(readable, writable, indirect=table if indirect else None)
        table += 0x100
    for name, which, n in case["mutations"]:
        lay.mutate(name, which, n)
    return ring


def foresee(target: Target, ring: DriverRing) -> tuple[list[Chain], str]:
    """What the Python twin takes from a copy of the memory, completing each chain at once. A
    device that is slower may find a head in flight, and stop earlier."""
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


def wait_for_answer(target: Target, ring: DriverRing) -> bool:
    """Until all is answered or a reset is asked for; whether it is."""
    deadline = time.monotonic() + 5
    while True:
        if target.rig.regs.status & NEEDS_RESET:
            return True
        if ring.memory.read_int(ring.used + 2, 2) == ring.avail_idx:
            return False
        assert time.monotonic() < deadline, "neither an answer nor DEVICE_NEEDS_RESET"
        time.sleep(0.0002)


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
        assert now == before, "the device wrote where it was given nothing to write"


def whole_segments(chain: Chain) -> bytes:
    data = chain.read(min(chain.read_len, 16 * 33))[16:]
    return data[: len(data) // 16 * 16]


def check_image(target: Target, chains: list[Chain]) -> None:
    """Only sectors that some request wrote may differ; then they are put back."""
    if target.image is None:
        return
    now = target.image.read_bytes()
    assert len(now) == SECTORS * 512
    asked: set[int] = set()
    for chain in chains:
        head = chain.read(16)
        if len(head) == 16 and head[:4] == b"\1\0\0\0":
            first = int.from_bytes(head[8:], "little")
            asked.update(range(first, min(SECTORS, first + (chain.read_len - 16) // 512)))
        if len(head) == 16 and int.from_bytes(head[:4], "little") in (11, 13):
            for first, count, _ in struct.iter_unpack("<QII", whole_segments(chain)):
                asked.update(range(first, min(SECTORS, first + count)))
    wrong = [
        s for s in range(SECTORS) if now[512 * s : 512 * s + 512] != pattern(s) and s not in asked
    ]
    assert not wrong
    with target.image.open("r+b") as f:
        for sector in asked:
            f.seek(512 * sector)
            f.write(pattern(sector))


def check_alive(target: Target) -> None:
    """After a reset a plain request works."""
    ring = target.ring()
    ring.memory.write(BUFFERS, struct.pack("<IIQ", 0, 0, 3))
    readable = [] if isinstance(target.rig.device, Rng) else [(BUFFERS, 16)]
    head = ring.add(readable, [(BUFFERS + 512, 512), (BUFFERS + 2048, 1)])
    target.start(ring)
    assert not wait_for_answer(target, ring)
    expect = 0 if isinstance(target.rig.device, Console) else 513
    assert ring.reap() == [(head, expect)]
    if target.image is not None:
        assert ring.memory.read(BUFFERS + 512, 512) == pattern(3)


@settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(case=CASE)
def test_whatever_the_driver_offers(target: Target, case: dict[str, Any]) -> None:
    ring = build(target, case)
    chains, verdict = foresee(target, ring)
    target.start(ring)
    broken = wait_for_answer(target, ring)
    target.rig.regs.status = 0  # whatever is in flight ends here
    if verdict not in ("empty", "chain"):
        assert broken, f"the queue is broken ({verdict}) and the device did not say so"
    done = []
    count = ring.memory.read_int(ring.used + 2, 2)
    for i in range(count):
        entry = ring.used + 4 + 8 * (i % SIZE)
        done.append(struct.unpack("<II", ring.memory.read(entry, 8)))
    room = {chain.head: chain.write_len for chain in chains}
    offers = Counter(chain.head for chain in chains)
    for head, written in done:
        assert written <= room[head]
    assert not Counter(head for head, _ in done) - offers, "a head completed too often"
    check_memory(target, ring, chains)
    check_image(target, chains)
    check_alive(target)

"""The hostile driver of test_virtio_devices.py, at virtio-pmem and at a device in Python."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import vmm
from tests.property.test_virtio_devices import (
    BUFFERS,
    CASE,
    SIZE,
    Target,
    build,
    check_memory,
    foresee,
    wait_for_answer,
)
from vmm.devices.virtio.pmem import ALIGN, Pmem


class Mirror(vmm.PythonVirtioDevice):
    """Answers with what it was sent, and keeps every third request for a while."""

    DEVICE_ID = 4
    QUEUE_SIZES = (256,)
    LIMIT = 4096

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[vmm.VirtioRequest] = []
        self.turn = 0

    def handle(self, request: vmm.VirtioRequest) -> None:
        assert request.size <= self.LIMIT >= request.room
        request.write(request.read())
        self.turn += 1
        if self.turn % 3 == 0:
            request.keep()
            self.kept.append(request)
        for held in self.kept[:-1]:
            held.done()
        del self.kept[:-1]
        if self.kept and self.kept[0] is not request:
            self.kept.pop().done()

    def stopped(self) -> None:
        for request in self.kept:
            request.write(b"void")
            request.done()
        self.kept.clear()


@pytest.fixture(scope="module", params=["pmem", "python"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    if request.param == "pmem":
        image = tmp_path_factory.mktemp("pmem") / "image"
        image.write_bytes(bytes(ALIGN))
        made = Target(Pmem(str(image)), 0)
    else:
        made = Target(Mirror(), 0)
    yield made
    assert getattr(made.rig.device, "error", None) is None
    made.close()


def check_alive(target: Target) -> None:
    """After a reset plain requests work."""
    ring = target.ring()
    ring.memory.write(BUFFERS, bytes(4))
    heads = [ring.add([(BUFFERS, 4)], [(BUFFERS + 64 * i, 4)]) for i in (1, 2, 3, 4)]
    target.start(ring)
    if isinstance(target.rig.device, Mirror):
        # Perhaps the last is kept; the one after it sets it free.
        target.rig.until(lambda: ring.memory.read_int(ring.used + 2, 2) >= 3, "the answers")
        return
    assert not wait_for_answer(target, ring)
    assert sorted(ring.reap()) == [(head, 4) for head in sorted(heads)]


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
    if isinstance(target.rig.device, Mirror):
        # One request may be kept for good: a queue that is broken says so, the rest ends here.
        if verdict not in ("empty", "chain"):
            target.rig.until_broken()
    else:
        broken = wait_for_answer(target, ring)
        assert broken or verdict in ("empty", "chain"), verdict
    target.rig.regs.status = 0  # whatever is in flight ends here
    room = {chain.head: chain.write_len for chain in chains}
    done = []
    for i in range(ring.memory.read_int(ring.used + 2, 2)):
        entry = ring.used + 4 + 8 * (i % SIZE)
        done.append(struct.unpack("<II", ring.memory.read(entry, 8)))
    for head, written in done:
        assert written <= room[head]
    offers = Counter(chain.head for chain in chains)
    assert not Counter(head for head, _ in done) - offers, "a head completed too often"
    check_memory(target, ring, chains)
    check_alive(target)

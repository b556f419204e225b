"""Some sessions of tests/fuzz with every virtio device, on both transports. The same seed every
time; ``python -m tests.fuzz`` makes more."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.dice import Finding
from tests.fuzz.executor import NAMES, InProcess
from tests.fuzz.session import IN_ORDER, Session, foretell
from tests.fuzz.targets import classes, targets
from tests.virtio_ring import RINGS

TARGETS = targets()
SESSIONS = 120


@pytest.mark.parametrize("transport", ["mmio", "pci"])
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_a_driver_does(name: str, transport: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    executor = InProcess(target.make(tmp_path), transport)
    try:
        for nr in range(SESSIONS):
            Session(executor, target, Random(f"test/{name}/{nr}")).run()
    finally:
        executor.close()


def test_no_device_is_left_out(tmp_path: Path) -> None:
    """Put what is missing into tests/fuzz/targets.py."""
    there = set()
    for target in TARGETS.values():
        device = target.make(tmp_path)
        there |= set(type(device).__mro__)
        device.close()
    assert not {cls for cls in classes() if cls not in there}


@pytest.mark.parametrize("form", sorted(RINGS))
def test_what_is_wrong_is_found(form: str, tmp_path: Path) -> None:
    """The oracles, against things a device might do."""
    target = TARGETS["rng"]
    executor = InProcess(target.make(tmp_path), "mmio")

    def session() -> Session:
        for nr in range(1000):
            s = Session(executor, target, Random(nr))
            lay = s.offer()
            if type(s.ring) is RINGS[form] and len(lay.heads) == 2:
                return s
        raise AssertionError

    try:
        s = session()
        told = foretell(s.memory, s.ring, s.twin)
        s.waiting += zip(told.chains, told.taken, strict=True)
        s.keep()
        s.memory.write(s.ring.end + 0x200, b"x")
        with pytest.raises(Finding, match="was not given"):
            s.check_memory()
        s.memory.write(s.ring.end + 0x200, b"\0")
        s.check_memory()

        def use(length: int, head: int) -> None:
            s.twin._inflight[head] = length
            if hasattr(s.twin, "_taken"):
                s.twin._taken[head] = told.taken[0]
            s.twin.push(told.chains[0], length)

        chain = told.chains[0]
        use(chain.write_len, chain.head)
        s.check_answers()
        use(chain.write_len, chain.head)
        s.features |= IN_ORDER
        with pytest.raises(Finding, match="IN_ORDER"):
            s.check_answers()
        s.features &= ~IN_ORDER
        with pytest.raises(Finding, match="too often"):
            s.check_answers()
        s.end()
        s = session()
        told = foretell(s.memory, s.ring, s.twin)
        s.waiting += zip(told.chains, told.taken, strict=True)
        chain = told.chains[0]
        chain.write_len += 1
        use(chain.write_len, chain.head)
        chain.write_len -= 1
        with pytest.raises(Finding, match="bytes used of"):
            s.check_answers()
        s.end()
    finally:
        executor.close()


def test_every_verdict_is_reached(tmp_path: Path) -> None:
    """Else the mutations miss a way to break a queue."""
    target = TARGETS["rng"]
    executor = InProcess(target.make(tmp_path), "mmio")
    seen = {""}
    # 4 GiB do not fit into this memory, and an entropy source gives all back at once.
    wanted = set(NAMES[2:]) - {"chain_bytes", "head_inflight", "request"}
    try:
        for nr in range(3000):
            Session(executor, target, Random(nr)).run()
            count, verdict = executor.breaks(0)
            seen |= {verdict} if count else set()
            if wanted <= seen:
                break
    finally:
        executor.close()
    assert wanted <= seen

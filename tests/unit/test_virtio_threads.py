"""I/O threads interrupt while a vCPU thread reads, acknowledges, masks and resets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from tests.virtio_mock import Rig, ToyDevice
from vmm.memory import GuestMemory

SECONDS = 0.5
#: However busy the host is, each job gets this far.
ROUNDS = 50


def hammer(*jobs: Callable[[], object]) -> None:
    """Every job over and over in a thread of its own; what one raises is raised here."""
    end = time.monotonic() + SECONDS
    failures: list[BaseException] = []

    def run(job: Callable[[], object]) -> None:
        try:
            rounds = 0
            while (time.monotonic() < end or rounds < ROUNDS) and not failures:
                job()
                rounds += 1
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_interrupts_while_the_driver_acknowledges(transport: str) -> None:
    toy = ToyDevice()
    rig = Rig(transport, toy, GuestMemory([(0, 1 << 20)]))  # type: ignore[arg-type]
    rig.driver.start()
    irqs = toy.irqs
    assert irqs is not None
    told = 0

    def acknowledge() -> None:
        nonlocal told
        told += rig.regs.interrupts() != 0

    hammer(lambda: irqs.notify(0), lambda: irqs.notify(1), irqs.config_changed, acknowledge)
    assert told
    rig.regs.interrupts()
    assert rig.regs.interrupts() == 0
    if transport == "pci":
        assert not rig.irq.level, "the line is down once all is read"
        irqs.notify(0)
        assert rig.irq.level
    rig.close()
    rig.memory.close()


def test_every_interrupt_survives_masking() -> None:
    """One signal, then mask and unmask at any moment: it arrives, or it is pending."""
    toy = ToyDevice()
    rig = Rig("pci", toy, GuestMemory([(0, 1 << 20)]))  # type: ignore[arg-type]
    rig.pci.msix_control(0x8000)
    rig.pci.msix_entry(0, 0xFEE0_0000, 1)
    rig.driver.negotiate()
    rig.pci.vector(0, 0)
    rig.driver.setup_queue(0)
    rig.regs.status = 0xF
    irqs = toy.irqs
    assert irqs is not None

    def toggle() -> None:
        rig.pci.msix_mask(0, True)
        rig.pci.msix_mask(0, False)

    hammer(lambda: irqs.notify(0), toggle)
    vector = rig.transport.table.vectors[0]  # type: ignore[union-attr]
    vector.discard()
    rig.pci.msix_mask(0, True)
    irqs.notify(0)
    assert rig.pci.pending() == 1
    rig.close()
    rig.memory.close()


def test_reset_while_the_device_speaks() -> None:
    toy = ToyDevice()
    rig = Rig("pci", toy, GuestMemory([(0, 1 << 20)]))  # type: ignore[arg-type]
    rig.driver.start()
    irqs = toy.irqs
    assert irqs is not None

    def restart() -> None:
        rig.driver.next = 0x1_0000
        rig.driver.reset()
        assert toy.irqs is None
        rig.regs.status = 3
        rig.regs.accept(1 << 32)
        rig.regs.status = 0xB
        rig.regs.status = 0xF

    hammer(restart, lambda: irqs.notify(0), irqs.fail, irqs.config_changed)
    assert toy.log.count("activate") - toy.log.count("deactivate") in (0, 1)
    assert toy.log.count("activate") > 2
    rig.driver.reset()
    assert not rig.irq.level
    rig.close()
    rig.memory.close()

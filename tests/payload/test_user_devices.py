"""Devices written in Python, under a guest on /dev/kvm. The examples are in payloads.toml."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmm

BUILT = Path(__file__).resolve().parents[2] / "build" / "guests"

pytestmark = pytest.mark.usefixtures("kvm")


class Broken(vmm.PioDevice):
    PORT, SIZE = 0x520, 4

    def read(self, offset: int, size: int) -> int:
        raise LookupError("a fault of the device")


class Dice(vmm.PythonVirtioDevice):
    """An entropy source; ``good`` or raising."""

    DEVICE_ID = 4
    QUEUE_SIZES = (16,)

    def __init__(self, good: bool) -> None:
        super().__init__()
        self.good = good

    def handle(self, request: vmm.VirtioRequest) -> None:
        if not self.good:
            raise LookupError("a fault of the device")
        request.write(bytes([5]) * request.room)


def machine(payload: str, device: vmm.Device, transport: str = "mmio") -> vmm.Machine:
    return vmm.Machine(
        kernel=BUILT / payload,
        devices=device,
        transport=transport,
        rng=False,
        testdev=True,
        memory="4M",
        timeout=30,
    )


def test_an_exception_in_a_handler_ends_the_machine() -> None:
    vm = machine("adder", Broken())
    with pytest.raises(LookupError, match="a fault of the device"):
        vm.run()


@pytest.mark.parametrize(("payload", "transport"), [("ring", "mmio"), ("ring_pci", "pci")])
def test_a_virtio_device(payload: str, transport: str) -> None:
    result = machine(payload, Dice(good=True), transport).run()
    assert (result.reason, result.status) == ("debug-exit", 1), result.console


def test_an_exception_on_a_devices_own_thread_ends_the_machine() -> None:
    vm = machine("ring", Dice(good=False))
    with pytest.raises(LookupError, match="a fault of the device"):
        vm.run()

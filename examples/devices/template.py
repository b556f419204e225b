"""A device of your own: copy this file, keep the class whose bus you want, delete the rest.

    vmm run -k KERNEL --device my.py:Ports            # or, from a library:
    vmm.Machine(kernel="...", devices=["my.py:Ports"])
    vmm.Machine(kernel="...", devices=[Ports(level=3)])

Everything a device needs is in ``vmm``; docs/devices.md says more about each part.
"""

from __future__ import annotations

import vmm


class Ports(vmm.PioDevice):
    """On I/O ports: one byte that can be read back."""

    # The first port and how many there are. If another device has one of them, the machine does
    # not start and says so. 0x520 to 0x5ff are free on vmm's PC.
    PORT, SIZE = 0x530, 1

    # What a user may write after the name: --device my.py:Ports,level=3,loud. A Field reads its
    # text by a function (here int; None makes a switch) and has a default. from_options gets the
    # values; leave both out for a device without options.
    OPTIONS = (
        vmm.Field("level", "what the port reads at first", int, default=0),
        vmm.Field("loud", "say so when it is written", None, default=False),
    )

    def __init__(self, level: int = 0, loud: bool = False) -> None:
        self.first = self.level = level
        self.loud = loud

    @classmethod
    def from_options(cls, options: vmm.Options, board: object) -> Ports:
        # Open files here or in __init__; later, the machine may have been sealed off.
        return cls(options.level, options.loud)

    # On the thread of the vCPU that made the access; no other device of this machine is asked
    # meanwhile. offset counts from PORT; size is 1, 2, 4 or 8; an access that reaches past SIZE
    # never comes here. The guest chooses all of it: check, and do not raise. (What you do raise
    # ends the machine, and Machine.wait() raises it.)
    def read(self, offset: int, size: int) -> int:
        return self.level

    def write(self, offset: int, size: int, value: int) -> None:
        self.level = value
        if self.loud:
            print(f"{self.name}: {value}")

    def reset(self) -> None:
        super().reset()
        self.level = self.first


class Registers(vmm.MmioDevice):
    """With memory-mapped registers and an interrupt: a doorbell that rings back."""

    # How many bytes of registers. The machine finds a place, self.base; or set BASE.
    SIZE = 0x1000
    # IRQ = False for a device without interrupt.
    # With HID the guest's ACPI names the device, its memory and its interrupt, and a Linux driver
    # with that id in its acpi_device_id table binds to it. Without, the guest has to know.
    HID = "VMMX0002"

    def read(self, offset: int, size: int) -> int:
        return int(self.irq.level)

    def write(self, offset: int, size: int, value: int) -> None:
        # Level-triggered: up until it is lowered, by the driver's word that it has seen it.
        self.irq.set(bool(value))

    def close(self) -> None:
        """The machine ends: stop threads, close files. No vCPU runs any more."""


class Queues(vmm.PythonVirtioDevice):
    """A virtio device: here, an entropy source that is not very random. virtio-v1.3 §5.4."""

    DEVICE_ID = 4  # virtio-v1.3 §5
    QUEUE_SIZES = (16,)  # of each queue the most it can hold, a power of two
    KERNEL_CONFIG = "CONFIG_HW_RANDOM_VIRTIO"  # told to the user when no driver came
    LIMIT = 65536  # of a request, at most so many bytes each way are looked at

    def __init__(self) -> None:
        super().__init__()
        # What the driver reads as the device's configuration space. After a change at run time,
        # call self.config_changed().
        self.config[:] = b""

    def device_features(self) -> int:
        """Feature bits of this type of device; those accepted are self.features later."""
        return 0

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The driver wrote to config, wholly inside; most devices ignore it."""

    # On the device's own thread, one request at a time. read() is what the driver sent, write()
    # appends to what it gets. It is answered when this returns; keep() leaves it open, and
    # done() answers it later, from any thread. refuse() one that makes no sense.
    def handle(self, request: vmm.VirtioRequest) -> None:
        if request.size or not request.room:
            request.refuse()
            return
        request.write(bytes(range(256)) * (request.room // 256) + b"\0" * (request.room % 256))

    def stopped(self) -> None:
        """The driver reset the device: requests that were kept are void."""

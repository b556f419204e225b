"""Ports that guests poke on every PC and expect nothing from."""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.bus import Bus


class Sink(Device):
    """Swallows writes to ``ports``, one byte each, and remembers the last; reads give it back."""

    def __init__(self, name: str, ports: tuple[int, ...]) -> None:
        self.name = name
        self.ports = ports
        self.reset()

    def place(self, bus: Bus) -> None:
        for offset, port in enumerate(self.ports):
            bus.insert(port, 1, self, offset)

    def reset(self) -> None:
        self._last = bytearray(len(self.ports))

    def last(self, port: int) -> int:
        """What was last written to a port of this sink."""
        return self._last[self.ports.index(port)]

    def read(self, offset: int, size: int) -> int:
        return self._last[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        self._last[offset] = value & 0xFF


class Port80(Sink):
    """0x80: power-on self-test codes, and Linux's delay between slow ports. 0xED: the other
    delay (io_delay=0xed). 0x87: a DMA page register that also serves as one."""

    POST = 0x80
    PORTS = (0x80, 0x87, 0xED)

    def __init__(self) -> None:
        super().__init__("port80", self.PORTS)

    @property
    def post_code(self) -> int:
        return self.last(self.POST)

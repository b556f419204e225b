"""``vmm qtest``: the devices of a machine without KVM, spoken to as QEMU's qtest clients do."""

from __future__ import annotations

import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: What --help says. docs/qtest.md has all of it.
FLAGS = (
    ("-M, -machine TYPE", "vmm (its own), pc (default) or q35, with PCI; microvm or virt, with "
     "virtio-mmio; none."),
    ("-m SIZE", "RAM; a plain number is MiB. (default: 128M)"),
    ("-device DRIVER[,KEY=VALUE]...", "A device by QEMU's name (virtio-blk-pci, virtio-rng-device, "
     "isa-debug-exit, ...), by vmm's, or FILE.py:Class. May be repeated."),
    ("-drive, -blockdev, -chardev, -netdev, -object", "What devices stand on, as QEMU has them."),
    ("-qtest WHERE", "Where qtest is spoken: unix:PATH, unix:PATH,server=on, stdio, fd:N, "
     "chardev:ID."),
    ("-qmp WHERE", "Where QMP is spoken, likewise. May be repeated; -mon with mode=control too."),
    ("-qtest-log FILE", "The session, line by line; 'none' for none. (default: stderr)"),
    ("-rtc clock=vm", "The real-time clock moves by clock_step alone."),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Raises ConfigError, HostError."""
    if any(arg in ("-h", "--help", "-help") for arg in argv):
        from vmm.cli import help as text

        print(text.of("qtest"), end="")
        return 0
    from vmm.qtest.machine import QtestMachine
    from vmm.qtest.options import parse
    from vmm.qtest.server import Server

    # As QEMU: a client ends its server with SIGTERM and looks at the status.
    _on_signals(lambda: sys.exit(0))
    spec = parse(argv)
    machine = QtestMachine(spec)
    try:
        server = Server(spec, machine)
        try:
            _on_signals(lambda: server.end(0))
            return server.run()
        finally:
            server.close()
    finally:
        machine.close()


def _on_signals(act: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: act())

"""vmm: a KVM virtual machine monitor whose userspace is Python.

This module is the whole public surface; everything below it may change.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import MachineConfig as MachineConfig
    from vmm.console import Console as Console
    from vmm.device import Device as Device
    from vmm.devices.user import Interrupt as Interrupt
    from vmm.devices.user import MmioDevice as MmioDevice
    from vmm.devices.user import PioDevice as PioDevice
    from vmm.devices.virtio.python import PythonVirtioDevice as PythonVirtioDevice
    from vmm.devices.virtio.python import VirtioRequest as VirtioRequest
    from vmm.errors import BootError as BootError
    from vmm.errors import CommandFailed as CommandFailed
    from vmm.errors import ConfigError as ConfigError
    from vmm.errors import GuestError as GuestError
    from vmm.errors import GuestLost as GuestLost
    from vmm.errors import GuestPanic as GuestPanic
    from vmm.errors import GuestTimeout as GuestTimeout
    from vmm.errors import HostError as HostError
    from vmm.errors import KvmError as KvmError
    from vmm.errors import MemoryFault as MemoryFault
    from vmm.errors import VmmError as VmmError
    from vmm.machine import Machine as Machine
    from vmm.memory import GuestMemory as GuestMemory
    from vmm.options import Field as Field
    from vmm.options import Options as Options
    from vmm.result import RunResult as RunResult

__version__ = "0.1.0"

#: Where each public name lives; looked up on first use, so that importing vmm costs nothing.
_HOMES = {
    "MachineConfig": "config",
    "Console": "console",
    "Device": "device",
    "Interrupt": "devices.user",
    "MmioDevice": "devices.user",
    "PioDevice": "devices.user",
    "PythonVirtioDevice": "devices.virtio.python",
    "VirtioRequest": "devices.virtio.python",
    "Field": "options",
    "Options": "options",
    "BootError": "errors",
    "CommandFailed": "errors",
    "ConfigError": "errors",
    "GuestError": "errors",
    "GuestLost": "errors",
    "GuestPanic": "errors",
    "GuestTimeout": "errors",
    "HostError": "errors",
    "KvmError": "errors",
    "MemoryFault": "errors",
    "VmmError": "errors",
    "Machine": "machine",
    "GuestMemory": "memory",
    "RunResult": "result",
}

__all__ = [  # noqa: RUF022 - in the order a reader wants them
    "Machine",
    "MachineConfig",
    "RunResult",
    "Console",
    "Device",
    "PioDevice",
    "MmioDevice",
    "Interrupt",
    "PythonVirtioDevice",
    "VirtioRequest",
    "Field",
    "Options",
    "GuestMemory",
    "VmmError",
    "ConfigError",
    "HostError",
    "KvmError",
    "BootError",
    "MemoryFault",
    "CommandFailed",
    "GuestError",
    "GuestPanic",
    "GuestLost",
    "GuestTimeout",
    "__version__",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vmm' has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"vmm.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

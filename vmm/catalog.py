"""The devices a user can add by name: those in vmm/devices, and those of installed packages.

A module there that has ``DEVICE``, a Device class with options (see ``OPTIONS`` in vmm/device.py),
is a flag of the command line, a key of the configuration file and a keyword of the library, all
called like the module: vmm/devices/virtio/net.py is ``--net user``, ``net = "user"`` and
``Machine(net="user")``. Nothing else names it. A package offers devices by entry points in the
group ``vmm.devices``; they, and classes by ``FILE.py:Class`` or ``module:Class``, are given by
``--device NAME[,option...]``.

Modules are loaded when they are named, so that a run pays for no device it does not have.
"""

from __future__ import annotations

import os
import sys

from vmm import options
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from vmm.board import Board
    from vmm.device import Device
    from vmm.options import Options

PACKAGES = ("vmm.devices.virtio", "vmm.devices")
GROUP = "vmm.devices"


def _home(package: str) -> str:
    return os.path.join(os.path.dirname(__file__), *package.split(".")[1:])


def _module(name: str) -> ModuleType | None:
    """The device module that the flag ``name`` stands for."""
    from importlib import import_module

    if not name.replace("_", "").isalnum() or not name.isascii():
        return None
    for package in PACKAGES:
        if os.path.exists(os.path.join(_home(package), f"{name}.py")):
            module = import_module(f"{package}.{name}")
            if hasattr(module, "DEVICE"):
                return module
    return None


def builtin(name: str) -> type[Device] | None:
    """vmm's own device of that name (dashes or underscores), or None."""
    module = _module(name.replace("-", "_"))
    return None if module is None else module.DEVICE


def builtins() -> dict[str, type[Device]]:
    """All of vmm's own, by their flags' names without dashes in front."""
    found = {}
    for package in PACKAGES:
        for file in os.listdir(_home(package)):
            name = file.removesuffix(".py")
            device = builtin(name) if file.endswith(".py") and name != "__init__" else None
            if device is not None:
                found[name.replace("_", "-")] = device
    return dict(sorted(found.items()))


class DeviceSpec:
    """A device as the user asked for it: ``kind`` is its name, ``options`` are read and checked,
    paths in them absolute."""

    __slots__ = ("cls", "kind", "options")

    def __init__(self, kind: str, cls: type[Device], options: Options) -> None:
        self.kind = kind
        self.cls = cls
        self.options = options

    def __str__(self) -> str:
        """As after --device."""
        text = str(self.options)
        kind = self.kind.replace(",", ",,")
        return f"{kind},{text}" if text else kind

    def __repr__(self) -> str:
        return f"DeviceSpec({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceSpec) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def build(self, name: str, board: Board) -> Device:
        """The device itself, not yet on the board. Raises ConfigError, HostError."""
        device = self.cls.from_options(self.options, board)
        device.name = name
        return device


def parse(text: str, base: str | None = None) -> DeviceSpec:
    """``NAME[,option...]``; relative paths start at ``base``. Raises ConfigError."""
    kind, *rest = options.split(text)
    cls = builtin(kind)
    label = kind
    if cls is None:
        label = f"device {kind}"
        kind, cls = _foreign(kind, base)
    return DeviceSpec(kind, cls, options.read(label, cls.OPTIONS, options.join(rest), base))


def _foreign(kind: str, base: str | None) -> tuple[str, type[Device]]:
    from vmm.device import Device

    home, colon, name = kind.rpartition(":")
    if colon:
        if home.endswith(".py"):
            home = os.path.abspath(os.path.join(base or "", home))
            found = getattr(_load_file(home), name, None)
        else:
            found = getattr(_load_module(home), name, None)
        kind = f"{home}:{name}"
    else:
        found = _entry_point(kind)
    if not (isinstance(found, type) and issubclass(found, Device)):
        raise ConfigError(
            f"--device {kind}: there is no such device; vmm's own are {', '.join(builtins())}, and "
            "one of your own is FILE.py:Class, module:Class or the name of an entry point."
        )
    return kind, found


def _load_file(path: str) -> object:
    import importlib.util

    name = "vmm_device_" + path.encode().hex()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--device {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        del sys.modules[name]
        if not isinstance(e, Exception):
            raise
        raise ConfigError(f"--device {path}: loading it raised {type(e).__name__}: {e}") from e
    return module


def _load_module(name: str) -> object:
    from importlib import import_module

    try:
        return import_module(name)
    except Exception as e:
        raise ConfigError(f"--device {name}: importing it raised {type(e).__name__}: {e}") from e


def _entry_point(name: str) -> object:
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=name):
        try:
            return entry.load()
        except Exception as e:
            raise ConfigError(
                f"--device {name}: loading {entry.value} raised {type(e).__name__}: {e}"
            ) from e
    return None

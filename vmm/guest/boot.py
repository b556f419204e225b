"""A machine that boots into vmm's own /init, which then takes commands: what it is made of.

The user's configuration says which kernel and which root; ``GuestBoot`` makes of it the
configuration that is built: the kernel's image, an initramfs with /init, modules and a plan, the
ports for streams, and a file system device for each shared directory.
"""

from __future__ import annotations

import os

from vmm import catalog
from vmm.devices.virtio.port import Port
from vmm.errors import ConfigError
from vmm.guest import system
from vmm.guest.cache import private_dir
from vmm.guest.initramfs import Initramfs
from vmm.guest.kernels import guest_kernel
from vmm.guest.plan import Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.config import MachineConfig

PREFIX = "org.vmm."
#: As ``root``: the files of --initrd are the guest's root.
INITRD = "initrd"

_ROOT_TAG = "root"
_SHARES = "/run/vmm"  # where the lower and upper parts of overlays are, for root's eyes only

#: What drives a device, by the option that brings it.
_MODULES = {
    "CONFIG_VIRTIO_BLK": "virtio_blk",
    "CONFIG_VIRTIO_NET": "virtio_net",
    "CONFIG_VIRTIO_VSOCKETS": "vmw_vsock_virtio_transport",
    "CONFIG_VIRTIO_BALLOON": "virtio_balloon",
    "CONFIG_VIRTIO_MEM": "virtio_mem",
    "CONFIG_VIRTIO_PMEM": "virtio_pmem",
    "CONFIG_VIRTIO_FS": "virtiofs",
}
_BUS = {
    "pci": ("virtio_pci", "/sys/bus/pci/drivers/virtio-pci", "CONFIG_VIRTIO_PCI"),
    "mmio": ("virtio_mmio", "/sys/bus/platform/drivers/virtio-mmio", "CONFIG_VIRTIO_MMIO"),
}
_DRIVERS = "/sys/bus/virtio/drivers"


class Share:
    """A directory of the host: ``tag`` on the device, ``target`` in the guest."""

    __slots__ = ("overlay", "path", "readonly", "tag", "target")

    def __init__(self, tag: str, text: str, *, readonly: bool, overlay: bool = False) -> None:
        """``text`` is HOST[:GUEST]; without GUEST the same path. Raises ConfigError."""
        path, colon, target = text.rpartition(":")
        if not colon:
            path, target = text, os.path.abspath(text)
        if not target.startswith("/"):
            raise ConfigError(f"{text}: the guest's side of a directory is an absolute path")
        if not os.path.isdir(path):
            raise ConfigError(f"{path}: there is no such directory to share")
        self.path = os.path.abspath(path)
        self.target = target
        self.tag = tag
        self.readonly = readonly
        self.overlay = overlay

    @property
    def spec(self) -> catalog.DeviceSpec:
        """The device that offers it."""
        path = self.path.replace(",", ",,")
        return catalog.parse(f"fs,{path},tag={self.tag}{',ro' if self.readonly else ''}")


class GuestBoot:
    """``config`` is what to build, ``ports`` are its ports by name. Holds a descriptor until it
    is closed, which may be as soon as the machine is built."""

    __slots__ = ("_fd", "config", "ports")

    def __init__(self, config: MachineConfig, *, tty: bool) -> None:
        """``config.root`` is set; ``tty``: a command may want a terminal.

        Raises ConfigError, HostError.
        """
        names = ("ctl", "in", "out", "err", *(["tty"] if tty else []))
        self.ports = {name: Port(PREFIX + name) for name in names}
        root, shares = _shares(config)
        modules = _modules(config, root, shares)
        kernel = guest_kernel(config.kernel, modules)
        wanted = [*modules, *(["virtio_rng"] if config.rng else [])]
        there = [name for name in wanted if kernel.modules.has(name)]
        initramfs = Initramfs(kernel, there, private_dir("guest", "initramfs"))
        plan = _plan(config, initramfs, there, list(self.ports), root, shares)
        self._fd = initramfs.with_plan(plan)
        self.config = config.replace(
            kernel=kernel.image,
            initrds=[*config.initrds, f"/proc/self/fd/{self._fd}"],
            append=[*_append(config), *config.append],
            devices=[
                *config.devices,
                *self.ports.values(),
                *(share.spec for share in ([root] if root else []) + shares),
            ],
        )

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _shares(config: MachineConfig) -> tuple[Share | None, list[Share]]:
    """The root, unless it is the initrd's, and the other directories."""
    root = None
    if config.root != INITRD:
        root = Share(_ROOT_TAG, f"{config.root}:/", readonly=not config.rw)
    shares = [Share(f"dir{i}", text, readonly=True) for i, text in enumerate(config.rodirs)]
    for text in config.rwdirs:
        shares.append(Share(f"dir{len(shares)}", text, readonly=False))
    for text in config.overlay_dirs:
        shares.append(Share(f"dir{len(shares)}", text, readonly=True, overlay=True))
    return root, shares


def _modules(config: MachineConfig, root: Share | None, shares: list[Share]) -> list[str]:
    """Names of the modules a kernel must have, unless they are built in."""
    names = [_BUS[config.transport][0], "virtio_console"]
    if root or shares:
        names.append("virtiofs")
    if (root and root.readonly) or any(share.overlay for share in shares):
        names.append("overlay")
    for wanted in config.devices:
        option = getattr(getattr(wanted, "cls", wanted), "KERNEL_CONFIG", "")
        if option in _MODULES:
            names.append(_MODULES[option])
    if config.disks:
        names.append("virtio_blk")
    return list(dict.fromkeys(names))


def _append(config: MachineConfig) -> list[str]:
    """A log that nobody reads as it comes: warnings and above, for the end after a panic."""
    kept = config.serial in ("buffer", "none") and config.console in ("buffer", "none")
    return ["loglevel=5"] if kept and config.default_append else []


def _plan(
    config: MachineConfig,
    initramfs: Initramfs,
    modules: list[str],
    ports: list[str],
    root: Share | None,
    shares: list[Share],
) -> Plan:
    """Up to where /init waits for commands."""
    plan = Plan()
    plan.add("end", "again")
    plan.mount("devtmpfs", "/dev", flags="nosuid")
    plan.mount("sysfs", "/sys")
    bus, driver, option = _BUS[config.transport]
    early = initramfs.load([name for name in (bus, "virtio_console") if name in modules])
    for path in early:
        plan.add("module", path, "")
    _need(plan, driver, bus, option)
    _need(plan, f"{_DRIVERS}/virtio_console", "virtio_console", "CONFIG_VIRTIO_CONSOLE")
    plan.add("ports", PREFIX, *(name for name in ports if name != "ctl"))
    for path in initramfs.load(modules):
        if path not in early:
            plan.add("module", path, "")
    if root or shares:
        _need(plan, f"{_DRIVERS}/virtiofs", "virtiofs", "CONFIG_VIRTIO_FS")
    _root(plan, root)
    for share in shares:
        _mount_share(plan, share)
    plan.add("hostname", config.hostname or config.name)
    plan.add("loopback")
    plan.add("await")
    return plan


def _need(plan: Plan, path: str, name: str, option: str) -> None:
    plan.add("require", path, 0, f"the kernel has no {name} driver ({option})")


def _root(plan: Plan, root: Share | None) -> None:
    if root is None:
        plan.mount("proc", "/proc", flags="nosuid,nodev,noexec")
        plan.mount("tmpfs", "/run", flags="nosuid,nodev", data="mode=755")
    elif root.readonly:
        plan.mount("virtiofs", "/lower", root.tag, "ro")
        system.overlay(plan, "/lower", "/new", "/upper")
    else:
        plan.mount("virtiofs", "/new", root.tag)
    if root is not None:
        system.kernel_mounts(plan, "/new")
        plan.add("root", "/new")
    system.devices(plan)
    if root is None or root.readonly:
        plan.add("mkdir", "/tmp", "1777")


def _mount_share(plan: Plan, share: Share) -> None:
    if not share.overlay:
        plan.mount("virtiofs", share.target, share.tag, "ro" if share.readonly else "")
        return
    own = f"{_SHARES}/{share.tag}"
    plan.add("mkdir", _SHARES, "700")
    plan.mount("virtiofs", f"{own}/lower", share.tag, "ro")
    system.overlay(plan, f"{own}/lower", share.target, f"{own}/upper")

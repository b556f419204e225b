"""The nested machine itself, whatever runs in it: kernel, memory, CPUs, shares; how it starts."""

from __future__ import annotations

import hashlib
import os

from vmm.arch.base import native_nesting
from vmm.guest.cache import private_dir
from vmm.guest.initramfs import Initramfs
from vmm.guest.kernels import KernelTree, find_kernel
from vmm.guest.plan import Plan
from vmm.guest.pump import MachineHung, MachineLost
from vmm.nested import qemu as qemu_module
from vmm.nested import snapshot
from vmm.nested.qemu import Qemu, Share, find_qemu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.guest.pump import Pump
    from vmm.nested.snapshot import Snapshot

PORTS = ("in", "out", "err", "tty")

_PREFIX = "org.vmm."
_PORT_MODULES = ["virtio_pci", "virtio_console"]
_SHARE_MODULES = ["9pnet_virtio", "9p", "overlay"]
# For the devices of machines inside; each is left out where the kernel has none.
_OPTIONAL = ["tun", "vhost_net", "vhost_vsock"]
_NO_SNAPSHOT = "VMM_NESTED_SNAPSHOT"  # set to 0: always boot
# A quiet host boots the machine in 4 s and restores it in 1, a busy one takes several times that;
# QEMU's emulation hangs once in a great while, and nothing is lost by another try.
_BOOT_S = (90.0, 240.0)
_RESTORE_S = 60.0


def needed() -> list[str]:
    """Modules without which there is no nested machine."""
    return [*_PORT_MODULES, *_SHARE_MODULES, *native_nesting().KVM_MODULES]


def find_parts(kernel: str | None) -> KernelTree:
    """Check that all a nested machine needs is here. HostError names what is missing."""
    find_qemu()
    return find_kernel(needed(), kernel)


class Machine:
    """What a start needs to know. ``memory`` in bytes; ``shares[0]`` is the root."""

    __slots__ = ("_append", "_cpus", "_image", "_initramfs", "_memory", "_plan", "_shares")

    def __init__(
        self, kernel: str | None, memory: int, cpus: int, shares: list[Share], verbose: bool
    ) -> None:
        """Find the parts; see ``find_parts``."""
        tree = find_parts(kernel)
        modules = [*needed(), *(name for name in _OPTIONAL if tree.modules.has(name))]
        self._initramfs = Initramfs(tree, modules, private_dir("nested", "initramfs"))
        self._plan = _boot_plan(self._initramfs, modules)
        self._image = tree.image
        self._memory = memory
        self._cpus = cpus
        self._shares = shares
        # Warnings and above: the serial line is slow, but a panic without registers says nothing.
        args = native_nesting().KERNEL_ARGS
        self._append = args if verbose else f"{args} loglevel=5"

    def run(self, pump: Callable[[Qemu], Pump], *, keep: bool) -> int:
        """Start a machine, hand it to ``pump`` and see that through; gives the exit status.

        With ``keep`` the machine comes from a snapshot, which is made when there is none yet.
        A snapshot that turns out to be of no use is removed, and the machine boots.
        """
        keep = keep and os.environ.get(_NO_SNAPSHOT) != "0"
        key = self._key()
        kept = (snapshot.find(key) or self._make(key, pump)) if keep else None
        if kept is not None:
            status = self._restored(kept, pump)
            if status is not None:
                return status
            kept.discard()
        for patience in _BOOT_S:
            with self._qemu() as qemu:
                session = pump(qemu)
                qemu.start()
                if session.boot(patience):
                    return _see_through(session, qemu, patience)
        raise MachineLost("The nested machine did not boot in time")

    def _restored(self, kept: Snapshot, pump: Callable[[Qemu], Pump]) -> int | None:
        """The exit status from a machine out of a snapshot; None when that was of no use."""
        with self._qemu(kept, "off") as qemu:
            session = pump(qemu)
            qemu.await_state()
            qemu.start()
            if not snapshot.load(qemu, kept.fds[snapshot.STATE]):
                return None
            try:
                return _see_through(session, qemu, _RESTORE_S)
            except MachineLost:
                if session.started_at is not None:
                    raise
        return None

    def _make(self, key: str, pump: Callable[[Qemu], Pump]) -> Snapshot | None:
        draft = snapshot.draft(self._memory)
        if draft is None:
            return None
        try:
            with self._qemu(draft, "on") as qemu:
                session = pump(qemu)
                qemu.start()
                if not session.boot(_BOOT_S[0]):
                    return None
                if not snapshot.save(qemu, draft.fds[snapshot.STATE]):
                    return None
            return draft.publish(key)
        except MachineLost:
            return None  # perhaps RAM in a file does not work here; the plain way will tell
        finally:
            draft.discard()

    def _qemu(self, ram: Snapshot | None = None, share: str = "") -> Qemu:
        image = native_nesting().kernel_image(self._image) or self._image
        qemu = Qemu(image, memory=self._memory, cpus=self._cpus, append=self._append)
        if ram is not None:
            qemu.use_ram_file(ram.fds.pop(), self._memory, share)  # RAM is the last
        qemu.add_initrd(self._initramfs.with_plan(self._plan))
        for name in ("ctl", *PORTS):
            qemu.add_port(_PREFIX, name)
        for item in self._shares:
            qemu.add_share(item)
        return qemu

    def _key(self) -> str:
        """Changes with whatever a snapshot depends on."""
        parts = [
            self._append,
            self._memory,
            self._cpus,
            len(self._shares),
            self._plan.encode(),
        ]
        for path in (find_qemu(), self._image):
            info = os.stat(path)
            parts += [path, info.st_size, info.st_mtime_ns]
        # A changed option for QEMU makes another machine, so what writes the options counts.
        for path in (__file__, qemu_module.__file__):
            with open(path, "rb") as source:
                parts.append(source.read())
        nesting = native_nesting()
        parts += [nesting.CPU, nesting.MACHINE, *nesting.measured()]
        parts.append(self._initramfs.key)
        return hashlib.sha256(repr(parts).encode(errors="replace")).hexdigest()[:32]


def _see_through(session: Pump, qemu: Qemu, patience: float) -> int:
    try:
        return session.run(patience)
    except MachineHung as error:
        raise MachineLost(f"{error}: {qemu.monitor.where()}") from None


def _boot_plan(initramfs: Initramfs, modules: list[str]) -> Plan:
    """Up to where all runs are the same."""
    plan = Plan()
    plan.add("end", "wait")
    plan.mount("devtmpfs", "/dev", flags="nosuid")
    plan.mount("sysfs", "/sys")
    early = initramfs.load(_PORT_MODULES)
    for path in early:
        plan.add("module", path, "")
    plan.add("ports", _PREFIX, *PORTS)
    for path in initramfs.load(modules):
        if path not in early:
            plan.add("module", path, "")
    plan.add("require", "/dev/kvm", 2000, f"/dev/kvm did not appear: {native_nesting().NO_KVM}")
    plan.add("await")
    return plan

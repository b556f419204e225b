"""KVM, one class per kind of file descriptor: the system, a VM, a vCPU. KVM api.rst §2.

Numbers and structs come from the kernel's headers through the C core. Every failure is a
KvmError that names the ioctl, what the kernel said, and what to do about it.
"""

from __future__ import annotations

import errno
import os
import stat

from vmm._native import ffi, lib
from vmm.errors import HostError, KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Self

    from vmm.memory import RamRange

DEV_KVM = "/dev/kvm"

_HINTS = {
    ("KVM_CREATE_VM", errno.ENOMEM): "The host is out of memory.",
    ("KVM_CREATE_VM", errno.EBUSY): "Another hypervisor holds the CPU's virtualization extension.",
    ("KVM_CREATE_VM", errno.EOPNOTSUPP): "Is virtualization enabled in the firmware?",
    ("KVM_CREATE_VCPU", errno.EINVAL): "Ask for fewer with --cpus.",
    ("KVM_CREATE_VCPU", errno.ENOMEM): "The host is out of memory.",
    ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL): "Ask for less with --memory.",
}


def call(fd: int, name: str, arg: Any = 0, *, what: str = "") -> int:
    """One ioctl by its name as in <linux/kvm.h>. Returns its result; raises KvmError."""
    argument = ffi.cast("void *", arg) if isinstance(arg, int) else arg
    rc = int(lib.ioctl(fd, getattr(lib, name), argument))
    if rc < 0:
        err = ffi.errno
        raise KvmError(name, err, what, _HINTS.get((name, err), ""))
    return rc


class Fd:
    """Owns one file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Kvm(Fd):
    """The system descriptor: /dev/kvm."""

    def __init__(self, path: str = DEV_KVM, *, modules: Sequence[str] = ()) -> None:
        """``modules``: what makes it, for advice. Raises HostError."""
        super().__init__(_open(path, modules))
        try:
            version = call(self.fd, "KVM_GET_API_VERSION")
        except KvmError as e:
            self.close()
            raise HostError(f"{path} is not a KVM device: {e}", errno=e.errno) from e
        if version != lib.KVM_API_VERSION:
            self.close()
            raise HostError(f"{path} speaks KVM API {version}; vmm needs {lib.KVM_API_VERSION}.")
        self.vcpu_mmap_size = call(self.fd, "KVM_GET_VCPU_MMAP_SIZE")

    def check(self, cap: str) -> int:
        """KVM_CHECK_EXTENSION by name; 0 when absent. KVM api.rst §4.4."""
        return call(self.fd, "KVM_CHECK_EXTENSION", int(getattr(lib, cap)))

    def require(self, *caps: str) -> None:
        missing = [cap for cap in caps if not self.check(cap)]
        if missing:
            raise HostError(f"This host's KVM lacks {', '.join(missing)}; vmm needs it.")

    def create_vm(self) -> Vm:
        # EINTR: a signal while the kernel builds its tables; nothing was made.
        while True:
            try:
                return Vm(self, call(self.fd, "KVM_CREATE_VM"))
            except KvmError as e:
                if e.errno != errno.EINTR:
                    raise


class Vm(Fd):
    """One virtual machine. KVM api.rst §4.2."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        super().__init__(fd)
        self.kvm = kvm
        self._slots = 0

    def add_memory(self, ranges: Sequence[RamRange], *, readonly: bool = False) -> None:
        """One slot per range. What a guest writes to a read-only one becomes an access to the
        memory bus. KVM api.rst §4.35."""
        for r in ranges:
            region = ffi.new(
                "struct kvm_userspace_memory_region *",
                {
                    "slot": self._slots,
                    "flags": lib.KVM_MEM_READONLY if readonly else 0,
                    "guest_phys_addr": r.gpa,
                    "memory_size": r.size,
                    "userspace_addr": r.hva,
                },
            )
            call(
                self.fd,
                "KVM_SET_USER_MEMORY_REGION",
                region,
                what=f"for {r.size >> 20} MiB at {r.gpa:#x}",
            )
            self._slots += 1

    def create_vcpu(self, index: int) -> Vcpu:
        fd = call(self.fd, "KVM_CREATE_VCPU", index, what=f"for vCPU {index}")
        return Vcpu(fd, index)

    def set_gsi_routing(self, routes: list[dict[str, int]]) -> None:
        """Replace the whole interrupt routing table; each route is the fields of a struct
        vmm_route by name. KVM api.rst §4.52."""
        table = ffi.new("struct vmm_route[]", routes)
        rc = lib.vmm_irq_route(self.fd, table, len(routes))
        if rc:
            raise KvmError("KVM_SET_GSI_ROUTING", -rc, f"for {len(routes)} routes")

    def irqfd(self, fd: int, gsi: int, *, assign: bool = True) -> None:
        """Bind or unbind an eventfd to a GSI. KVM api.rst §4.75."""
        flags = 0 if assign else lib.KVM_IRQFD_FLAG_DEASSIGN
        arg = ffi.new("struct kvm_irqfd *", {"fd": fd, "gsi": gsi, "flags": flags})
        call(self.fd, "KVM_IRQFD", arg, what=f"for GSI {gsi}")

    def ioeventfd(
        self,
        fd: int,
        addr: int,
        size: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None:
        """Have writes at addr signal fd without an exit; size 0 matches any width.
        KVM api.rst §4.59."""
        flags = lib.KVM_IOEVENTFD_FLAG_PIO if pio else 0
        if datamatch is not None:
            flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        if not assign:
            flags |= lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        arg = ffi.new(
            "struct kvm_ioeventfd *",
            {"datamatch": datamatch or 0, "addr": addr, "len": size, "fd": fd, "flags": flags},
        )
        call(self.fd, "KVM_IOEVENTFD", arg, what=f"at {addr:#x}")


class Vcpu(Fd):
    """One virtual CPU. Its ioctls block while another thread is in KVM_RUN: pause first."""

    def __init__(self, fd: int, index: int) -> None:
        super().__init__(fd)
        self.index = index

    def get(self, name: str, struct: str) -> Any:
        """A KVM_GET_* ioctl into a fresh struct, which is returned."""
        value = ffi.new(f"struct {struct} *")
        call(self.fd, name, value, what=f"on vCPU {self.index}")
        return value

    def set(self, name: str, value: Any) -> None:
        """A KVM_SET_* ioctl."""
        call(self.fd, name, value, what=f"on vCPU {self.index}")


def _open(path: str, modules: Sequence[str]) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise HostError(explain_open(path, e, modules), errno=e.errno) from e


def explain_open(path: str, error: OSError, modules: Sequence[str] = ()) -> str:
    """One sentence on why /dev/kvm could not be opened and what to do."""
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            st = os.stat(path)
            mode = f" (mode {stat.S_IMODE(st.st_mode):04o}, group {_group(st.st_gid)})"
        except OSError:
            mode = ""
        return (
            f"{path} may not be opened by this user{mode}: {error.strerror}. "
            "Add yourself to its group ('sudo usermod -aG kvm $USER', then log in again)."
        )
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        how = f" (modprobe {' or '.join(modules)})" if modules else ""
        return (
            f"{path} is not there: {error.strerror}. Load the module{how}, enable virtualization "
            "in the firmware, or use 'vmm run --accel nested'."
        )
    return f"{path} could not be opened: {error.strerror}."


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)

"""The QEMU process that carries the nested machine: its command line, its life and its end."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket

from vmm.arch.base import native_nesting
from vmm.errors import HostError
from vmm.guest.pump import MachineLost
from vmm.nested.monitor import Monitor

_PR_SET_PDEATHSIG = 1


def find_qemu() -> str:
    """The path of QEMU's system emulator. HostError names the package when it is missing."""
    nesting = native_nesting()
    path = shutil.which(nesting.QEMU)
    if path is None:
        raise HostError(
            f"The nested machine needs {nesting.QEMU}, which is not installed: "
            f"install {nesting.QEMU_PACKAGE} (Debian)"
        )
    return path


class Share:
    """A host directory offered over 9p under ``tag``; ``path`` is absolute."""

    __slots__ = ("path", "readonly", "tag")

    def __init__(self, tag: str, path: str, *, readonly: bool) -> None:
        self.tag = tag
        self.path = path
        self.readonly = readonly


class Qemu:
    """One QEMU process, killed with this one whatever happens.

    ``ports`` maps a virtio-serial port's name to our socket of it, ``serial`` is the machine's
    serial line, ``errors`` the descriptor of what QEMU itself says, ``pidfd`` tells its end; all
    of them are non-blocking. ``monitor`` is QMP, if asked for. Everything is owned here.
    """

    noun = "nested machine"

    __slots__ = (
        "_theirs",
        "args",
        "errors",
        "monitor",
        "pid",
        "pidfd",
        "ports",
        "serial",
        "status",
    )

    def __init__(self, kernel: str | int, *, memory: int, cpus: int, append: str) -> None:
        """``memory`` in bytes; ``kernel`` a path, or a descriptor that is owned from here on.
        Nothing runs before ``start``."""
        self.pid = self.pidfd = self.errors = -1
        self.status: int | None = None
        self.ports: dict[str, socket.socket] = {}
        self._theirs: list[int] = []
        self.args = [find_qemu(), "-nodefaults", "-no-user-config", "-no-reboot"]
        self.args += ["-display", "none"]
        self.args += ["-accel", "tcg,thread=multi", "-cpu", native_nesting().CPU]
        self.args += ["-m", f"{memory >> 20}M", "-smp", str(cpus), "-kernel"]
        self.args += [kernel if isinstance(kernel, str) else self._pass(kernel)]
        self.args += ["-append", append, "-machine", native_nesting().MACHINE]
        self.serial = self._socket("serial0")
        self.args += ["-serial", "chardev:serial0"]
        self.monitor = Monitor(self._socket("monitor"))
        self.args += ["-mon", "chardev=monitor,mode=control"]
        self.args += ["-device", "virtio-serial-pci,disable-legacy=on"]

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use_ram_file(self, fd: int, memory: int, share: str) -> None:
        """Keep RAM in a file, whose descriptor is owned from here on; with ``share`` "off" the
        file stays as it is. In either case the state written by migration can be that of the
        devices alone."""
        backend = f"memory-backend-file,id=ram,size={memory},mem-path={self._pass(fd)}"
        self.args += ["-object", f"{backend},share={share}", "-machine", "memory-backend=ram"]

    def await_state(self) -> None:
        """The monitor has to fill the machine before that runs."""
        self.args += ["-incoming", "defer"]

    def add_initrd(self, fd: int) -> None:
        """Use the archive in this memfd, which is owned from here on."""
        self.args += ["-initrd", self._pass(fd)]

    def add_port(self, prefix: str, name: str) -> None:
        """Add a virtio-serial port."""
        self.ports[name] = self._socket(name)
        self.args += ["-device", f"virtserialport,chardev={name},name={prefix}{name}"]

    def add_share(self, share: Share) -> None:
        """Offer a directory."""
        path = share.path.replace(",", ",,")
        access = "readonly=on" if share.readonly else "readonly=off"
        self.args += [
            "-fsdev",
            f"local,id={share.tag},path={path},security_model=none,{access},multidevs=remap",
            "-device",
            f"virtio-9p-pci,fsdev={share.tag},mount_tag={share.tag},disable-legacy=on",
        ]

    def start(self) -> None:
        """Start the process, in a session of its own so that the terminal's signals miss it."""
        self.errors, theirs = os.pipe()
        os.set_blocking(self.errors, False)
        self._theirs.append(theirs)
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() == parent:  # else it died before the line above
                    self._exec(theirs)
            except BaseException as error:
                os.write(theirs, f"{self.args[0]}: {error}\n".encode())
            finally:
                os._exit(127)
        self.pidfd = os.pidfd_open(self.pid)
        self._close_theirs()

    def close(self) -> None:
        """Kill the process if it lives, bury it, close every descriptor. May be called twice."""
        if self.pid > 0 and self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self._close_theirs()
        self.monitor.close()
        for ours in (self.serial, *self.ports.values()):
            ours.close()
        for fd in (self.pidfd, self.errors):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.errors = -1

    def wait(self) -> int:
        """Wait for the process's end; its status as os.waitstatus_to_exitcode gives it."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status

    @property
    def done(self) -> int:
        """Readable when the process has ended."""
        return self.pidfd

    @property
    def logs(self) -> tuple[int, int]:
        """What the machine prints, and what QEMU does."""
        return self.serial.fileno(), self.errors

    def lost(self, log: bytearray) -> MachineLost:
        """Why the process ended though the command had not; waits for it."""
        return MachineLost(f"The nested machine ended early: {_why_ended(self.wait(), log)}")

    def _exec(self, errors: int) -> None:
        null = os.open("/dev/null", os.O_RDWR)
        for fd, source in ((0, null), (1, errors), (2, errors)):
            os.dup2(source, fd)
        keep = sorted(fd for fd in self._theirs if fd != errors)
        last = 2
        for fd in keep:
            os.set_inheritable(fd, True)
            os.closerange(last + 1, fd)
            last = fd
        os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
        for signo in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(signo, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execv(self.args[0], self.args)

    def _socket(self, name: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        fd = theirs.detach()
        self._theirs.append(fd)
        self.args += ["-chardev", f"socket,id={name},fd={fd}"]
        return ours

    def _pass(self, fd: int) -> str:
        """Let the process inherit a descriptor; the name it can open it by."""
        self._theirs.append(fd)
        return f"/dev/fd/{fd}"

    def _close_theirs(self) -> None:
        for fd in self._theirs:
            os.close(fd)
        self._theirs.clear()


def _why_ended(status: int, log: bytearray) -> str:
    lines = log.decode(errors="replace").splitlines()
    for line in reversed(lines):
        for mark in ("vmm-init: ", "Kernel panic - not syncing: ", f"{native_nesting().QEMU}: "):
            if mark in line:
                return line[line.index(mark) :].strip()
    if status < 0:
        return f"QEMU was killed by signal {-status}"
    return f"QEMU ended with status {status}"

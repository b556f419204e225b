"""User-mode networking: passt, a process that turns frames into sockets of the host's. It needs no
root, and gives the guest DHCP, DNS and the host's connectivity."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time

from vmm._native import lib
from vmm.devices.virtio.net_backend import Backend
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.devices.virtio.net_options import Forward

#: The network as the guest sees it, the same as in QEMU: its address, prefix, and the gateway,
#: which stands for the host.
ADDRESS, PREFIX, GATEWAY = "10.0.2.15", 24, "10.0.2.2"
GATEWAY_MAC = "52:55:0a:00:02:02"

#: The largest packet whose frame's header still fits 64 KiB, in words: fewer, larger frames.
MTU = 65520

#: For passt to answer. An emulated host is slow.
START_TIMEOUT = 30.0
STOP_TIMEOUT = 5.0


class User(Backend):
    """A passt process and the socket to it. Raises HostError."""

    kind = lib.VMM_NET_STREAM
    ident = "user"

    def __init__(self, forwards: Sequence[Forward] = (), *, mtu: int = 0) -> None:
        super().__init__()
        self.mtu = mtu or MTU
        self._forwards = list(forwards)
        self._pid = 0
        self._said = -1
        for forward in self._forwards:
            error = _bind_error(forward)
            if error:
                raise HostError(
                    f"--net forward={forward}: port {forward.host} cannot be had: "
                    f"{os.strerror(error)}; choose another.",
                    errno=error,
                )
        self._start(_find())

    def _start(self, program: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.fds = [ours.detach()]
            # What it says matters only if it dies at once; it must never wait for a reader.
            self._said, log = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._pid = os.posix_spawn(
                    program,
                    self._command(program),
                    os.environ,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, log, 1),
                        (os.POSIX_SPAWN_DUP2, log, 2),
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
                    ],
                    setpgroup=0,  # Ctrl-C is not for it
                    setsigmask=[],
                )
            except OSError as e:
                self.close()
                raise HostError(
                    f"--net user: {program} could not be started: {e.strerror}.", errno=e.errno
                ) from e
            finally:
                os.close(log)

    def _command(self, program: str) -> list[str]:
        """It ends when our end of its socket closes, however we end (--fd)."""
        words = [program, "--foreground", "--stderr", "--quiet", "--fd", "3"]
        words += ["--address", ADDRESS, "--netmask", str(PREFIX), "--gateway", GATEWAY]
        words += ["--mac-addr", GATEWAY_MAC, "--mtu", str(self.mtu)]
        if not _has_route():
            words += ["--ipv4-only", "--interface", "lo"]
        for forward in self._forwards:
            flag = "--udp-ports" if forward.udp else "--tcp-ports"
            words += [flag, f"{forward.address}/{forward.host}:{forward.guest}"]
        return words

    def ready(self, mac: bytes) -> None:
        """It has its sockets when it answers: ask it who the gateway is."""
        gateway = socket.inet_aton(GATEWAY)
        ask = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, b"", b"", gateway)
        frame = b"\xff" * 6 + mac + b"\x08\x06" + ask
        deadline = time.monotonic() + START_TIMEOUT
        # Asked again: while it starts, a frame can be lost.
        with socket.socket(fileno=os.dup(self.fds[0])) as s:
            try:
                s.sendall(struct.pack("!I", len(frame)) + frame)
                while not _is_answer(_frame(s, deadline), gateway):
                    pass
            except OSError as e:
                raise self._failed(e) from e
            s.setblocking(True)
        for forward in self._forwards:
            if not _bind_error(forward):
                hint = " (started by root, it runs as nobody)" if forward.host < 1024 else ""
                raise HostError(
                    f"--net forward={forward}: passt could not take port {forward.host}{hint}; "
                    "choose another."
                )

    def _failed(self, e: OSError) -> HostError:
        if isinstance(e, TimeoutError):
            return HostError(f"--net user: passt gave no sign of life in {START_TIMEOUT:.0f} s.")
        try:
            said = os.read(self._said, 65536).decode(errors="replace")
        except BlockingIOError:
            said = ""
        lines = [line for line in said.splitlines() if line and "syslog" not in line]
        return HostError(
            f"--net user: passt ended at once: {'; '.join(lines[-3:]) or 'it said nothing'}."
        )

    def obituary(self, error: int) -> str:
        return "passt, which was its network, ended; the link is down"

    def close(self) -> None:
        super().close()  # which is its end
        if self._said >= 0:
            os.close(self._said)
            self._said = -1
        pid, self._pid = self._pid, 0
        if pid:
            _reap(pid)


def _reap(pid: int) -> None:
    import signal

    deadline = time.monotonic() + STOP_TIMEOUT
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], max(0, deadline - time.monotonic()))[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass  # an embedder that reaps all children was faster
    finally:
        os.close(pidfd)


def _find() -> str:
    for folder in os.get_exec_path():
        path = os.path.join(folder, "passt")
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    raise HostError(
        "--net user needs passt, which is not on PATH; install the package passt "
        "(apt install passt), or use --net tap.",
        errno=errno.ENOENT,
    )


def _has_route() -> bool:
    """Whether the host has a default route for IPv4, which passt takes its interface from."""
    try:
        with open("/proc/net/route", encoding="ascii") as f:
            return any(line.split()[1::6] == ["00000000", "00000000"] for line in f)
    except (OSError, IndexError):
        return False


def _bind_error(forward: Forward) -> int:
    """0 if the port is free, else the errno."""
    family = socket.AF_INET6 if ":" in forward.address else socket.AF_INET
    kind = socket.SOCK_DGRAM if forward.udp else socket.SOCK_STREAM
    try:
        with socket.socket(family, kind) as s:
            if not forward.udp:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((forward.address, forward.host))
    except OSError as e:
        return e.errno or errno.EINVAL
    return 0


def _frame(s: socket.socket, deadline: float) -> bytes:
    """The next frame, not a byte of what follows it. Raises OSError."""

    def take(size: int) -> bytes:
        data = b""
        while len(data) < size:
            s.settimeout(max(0.001, deadline - time.monotonic()))
            got = s.recv(size - len(data))
            if not got:
                raise ConnectionResetError(errno.ECONNRESET, "closed")
            data += got
        return data

    return take(min(struct.unpack("!I", take(4))[0], 1 << 17))


def _is_answer(frame: bytes, address: bytes) -> bool:
    return frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\2" and frame[28:32] == address

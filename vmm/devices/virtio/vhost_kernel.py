"""The host's kernel as the one who walks the rings: /dev/vhost-net and /dev/vhost-vsock."""

from __future__ import annotations

import errno
import os

from vmm._native import ffi, lib
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory


class Vhost:
    """An open vhost device of this process. ``close`` gives it back, and ends what it does."""

    __slots__ = ("fd", "features", "path")

    def __init__(self, path: str, flag: str) -> None:
        """``flag``: what asked for it, for messages. Raises HostError."""
        self.path = path
        self.fd = -1
        module = path.rpartition("/")[2].replace("-", "_")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            self._check(lib.vmm_vhost_own(self.fd))
            out = ffi.new("uint64_t *")
            self._check(lib.vmm_vhost_features(self.fd, out))
        except OSError as e:
            self.close()
            hint = f"load the module {module} (modprobe {module}), or leave vhost away"
            if e.errno == errno.EACCES:
                hint = "join the group that may (ls -l tells), or leave vhost away"
            raise HostError(
                f"{flag}: {path} cannot be used: {e.strerror}; {hint}.", errno=e.errno
            ) from e
        #: Feature bits that it knows.
        self.features = int(out[0])

    @staticmethod
    def _check(rc: int) -> None:
        if rc:
            raise OSError(-rc, os.strerror(-rc))

    def prepare(self, features: int, memory: GuestMemory) -> int:
        """Before its rings are started; 0 or -errno."""
        return int(lib.vmm_vhost_prepare(self.fd, features & self.features, memory.table))

    def start(self, ring: int, call_fd: int, config: Any) -> int:
        """``config``: struct vmm_service_config *. 0 or -errno."""
        return int(lib.vmm_vhost_start(self.fd, ring, call_fd, config))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

"""virtio-fs: a directory of the host in the guest. virtio-v1.3 §5.11; FUSE 7.31 and later.

In Linux: ``mount -t virtiofs TAG /mnt``. There is no helper daemon: native/fs*.c answers on the
device's I/O thread what the host's caches can answer, and what may take long on worker threads.

What a guest can reach is what is below the directory. It names files by numbers that were given to
it, and entries by single names; every step on the host is one such name in one directory, opened
without following symbolic links, and counts only if it leads to the file that the number stands
for. Devices, FIFOs and sockets are seen but never opened, and device nodes are not made. The
kernel's own file systems (procfs, sysfs, cgroups...), where names lead to memory, descriptors and
roots of processes, are empty directories.

Users: ``uid=pass`` leaves numbers as they are, and new files get the guest's user if vmm runs as
root (its default). ``uid=squash`` (the default otherwise) does everything as the user of vmm, whose
files the guest sees as root's; those of others stay theirs. See docs/sharing.md.
"""

from __future__ import annotations

import os
import struct

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError, HostError
from vmm.options import Field
from vmm.values import parse_count, parse_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.board import Board
    from vmm.memory import GuestMemory
    from vmm.options import Options

QUEUE_SIZE = 512
QUEUES_MAX = 16
#: Bytes of a guest's memory that an inode takes it, more or less: it need not know more files
#: than it has memory for, and what vmm keeps of each is a fraction of that.
_INODE_BYTES = 1024
_INODES = (1 << 16, 1 << 24)
#: Descriptors left for everything else, and the fewest a share works with.
_FDS_KEPT = 256
_FDS = (64, 1 << 17)

CACHES = {
    "auto": lib.VMM_FS_AUTO,
    "always": lib.VMM_FS_ALWAYS,
    "never": lib.VMM_FS_NEVER,
}
IDS = {"pass": lib.VMM_FS_PASS, "squash": lib.VMM_FS_SQUASH}
LOCKS = ("guest", "host")

#: tag, num_request_queues: virtio-v1.3 §5.11.4.
CONFIG = struct.Struct("<36sI")
_TAG_MAX: int = lib.VMM_FS_TAG


def parse_tag(text: str) -> str:
    if not text or len(os.fsencode(text)) > _TAG_MAX or "\0" in text:
        raise ValueError(f"must be 1 to {_TAG_MAX} bytes")
    return text


def _parse_queues(text: str) -> int:
    count = parse_count(text)
    if not 1 <= count <= QUEUES_MAX:
        raise ValueError(f"must be from 1 to {QUEUES_MAX}")
    return count


class Fs(VirtioDevice):
    """One shared directory. Opens it now, so that no path is looked up once a guest runs.

    ``tag`` is what the guest mounts, default the device's name. ``uid``: 'pass' or 'squash', by
    default what fits the user. ``cache``: 'auto' (names and attributes are believed for a second,
    contents until they change), 'always' (nobody else changes anything), 'never'. ``locks``:
    'host' makes the guest's locks visible to the host and to other guests, which costs a request
    whenever a file is closed. ``writeback``: the guest may keep what it wrote. Raises ConfigError,
    HostError.
    """

    DEVICE_ID = 26
    KERNEL_CONFIG = "CONFIG_VIRTIO_FS"

    HELP = (
        "Share the directory PATH with the guest (virtio-fs): mount -t virtiofs TAG DIR. A guest "
        "reaches nothing outside it."
    )
    OPTIONS = (
        Field("path", "the directory", parse_path, first=True, path=True, required=True),
        Field("tag", "what the guest mounts, default fs0, fs1...", parse_tag, metavar="NAME"),
        Field("ro", "the guest only reads", None, default=False),
        Field(
            "cache", "auto, always (nobody else writes) or never", default="auto",
            choices=tuple(CACHES),
        ),
        Field(
            "uid", "pass: users have the same numbers on both sides (default for root); squash: "
            "all is done as the host's user, who is the guest's root", choices=tuple(IDS),
        ),
        Field(
            "locks", "guest, or host: also against the host and other guests", default="guest",
            choices=LOCKS,
        ),
        Field("writeback", "the guest's kernel may hold back writes", None, default=False),
        Field("queues", "request queues, default 1", _parse_queues, metavar="N", default=1),
    )  # fmt: skip

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Fs:
        return cls(
            options.path, tag=options.tag, ro=options.ro, cache=options.cache, uid=options.uid,
            locks=options.locks, writeback=options.writeback, queues=options.queues,
        )  # fmt: skip

    def __init__(
        self,
        path: str,
        *,
        tag: str | None = None,
        ro: bool = False,
        cache: str = "auto",
        uid: str | None = None,
        locks: str = "guest",
        writeback: bool = False,
        queues: int = 1,
        name: str = "fs0",
    ) -> None:
        try:
            self._tag = tag if tag is None else parse_tag(tag)
        except ValueError as e:
            raise ConfigError(f"The tag of a share {e}, not {tag!r}.") from None
        self.path = path
        self.read_only = ro
        self.cache = cache
        self.uid = uid or ("squash" if os.geteuid() else "pass")
        self._settings = (CACHES[cache], IDS[self.uid], writeback and not ro, locks == "host")
        # The first is for what must not wait: virtio-v1.3 §5.11.2.
        self.QUEUE_SIZES = (QUEUE_SIZE,) * (1 + queues)
        self._native = ffi.NULL
        self._fds = self._open()
        super().__init__(name)

    def plug(self, board: Board) -> None:
        for device in board.virtio:
            if isinstance(device, Fs) and device.tag == self.tag:
                self.close()
                raise ConfigError(
                    f"--fs: {device.path} and {self.path} both have the tag {self.tag}."
                )
        super().plug(board)

    @property
    def tag(self) -> str:
        return self._tag or self.name

    def _open(self) -> list[int]:
        """The directory, and where the process finds its own descriptors."""
        try:
            root = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise HostError(
                f"The directory {self.path} cannot be shared: {e.strerror}.", errno=e.errno
            ) from e
        try:
            if lib.vmm_fs_pseudo(root):
                raise ConfigError(
                    f"{self.path} cannot be shared: it is a part of the kernel, not of a disk."
                )
            proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            os.close(root)
            raise HostError(
                f"{self.path} cannot be shared without /proc: {e.strerror}.", errno=e.errno
            ) from e
        except BaseException:
            os.close(root)
            raise
        return [root, proc]

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        self.config[:] = CONFIG.pack(os.fsencode(self.tag), len(self.QUEUE_SIZES) - 1)
        count = len(self.QUEUE_SIZES)
        loops = self.io_loops(loop, count)
        config = ffi.new("struct vmm_fs_config *")
        config.root_fd, config.proc_fd = self._fds
        config.read_only = self.read_only
        config.cache, config.ids, config.writeback, config.host_locks = self._settings
        config.workers_only = loops[0] == loop
        config.queues = count - 1
        config.queue_size = QUEUE_SIZE
        config.umask = _umask()
        ram = sum(r.size for r in memory.ranges)
        config.inodes_max = min(max(ram // _INODE_BYTES, _INODES[0]), _INODES[1])
        config.fds_max = _descriptors()
        each = ffi.new("struct vmm_loop *[]", [loops[i % len(loops)] for i in range(count)])
        self._native = lib.vmm_fs_create(each, config)
        if self._native == ffi.NULL:
            raise HostError(
                f"{self.path} cannot be shared: {os.strerror(ffi.errno)}.", errno=ffi.errno
            )

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_fs_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_fs_stop(self._native)

    def stop_queue(self, index: int) -> None:
        lib.vmm_fs_stop_queue(self._native, index)

    def stats(self) -> dict[str, int]:
        """Requests, errors and bytes so far; files and descriptors in use now; requests that wait
        for a lock. Any thread."""
        out = ffi.new("struct vmm_fs_stats *")
        if self._native != ffi.NULL:
            lib.vmm_fs_stats(self._native, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof(out).item.fields}

    def close(self) -> None:
        super().close()
        lib.vmm_fs_destroy(self._native)
        self._native = ffi.NULL
        self.close_threads()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _umask() -> int:
    """This process's, which can only be had by setting it, or here."""
    with open("/proc/self/status", encoding="utf-8", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022


def _descriptors() -> int:
    """How many a share may use, after the process has all it may have."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft == resource.RLIM_INFINITY:
        return _FDS[1]
    return min(max((soft - _FDS_KEPT) // 2, _FDS[0]), _FDS[1])


DEVICE = Fs

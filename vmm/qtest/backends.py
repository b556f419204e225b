"""What devices stand on, in QEMU's words: -drive, -blockdev, -chardev, -netdev, -object."""

from __future__ import annotations

import os

from vmm.disk import DiskSpec
from vmm.errors import ConfigError, HostError
from vmm.qtest.options import Props

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.qtest.options import Spec

NULL_SIZE = 1 << 30
#: Properties that change how QEMU reaches a file, but not what the guest sees.
_DRIVE_IGNORED = (
    "auto-read-only", "cache.no-flush", "cache.writeback", "copy-on-read", "detect-zeroes",
    "file.driver", "file.locking", "force-share", "index", "latency-ns", "locking",
    "media", "read-zeroes", "file.read-zeroes", "bus", "unit",
)  # fmt: skip
_NULL_DRIVERS = ("null-co", "null-aio")
_FILE_DRIVERS = ("file", "host_device")
#: QEMU's cache modes, in ours.
_CACHES = {
    "writeback": "writeback",
    "unsafe": "writeback",
    "none": "none",
    "writethrough": "writethrough",
    "directsync": "directsync",
}


class Drive:
    """A disk image, opened by whoever uses it; ``spec`` is how."""

    __slots__ = ("spec", "uring")

    def __init__(self, spec: DiskSpec, *, uring: bool) -> None:
        self.spec = spec
        self.uring = uring


class Backends:
    """All of one command line. Owns what stands for null images; ``close`` gives it back."""

    def __init__(self, spec: Spec) -> None:
        """Raises ConfigError, HostError."""
        self.drives: dict[str, Drive] = {}
        #: Drives that ask for a disk by themselves (if=virtio), by name.
        self.plugged: list[str] = []
        self.chardevs = spec.chardevs
        self.netdevs = spec.netdevs
        self.objects = spec.objects
        self._nodes: dict[str, Props] = {}
        self._fds: list[int] = []
        try:
            for props in spec.blockdevs:
                name = props.take("node-name")
                if not name or name in self._nodes:
                    raise ConfigError("-blockdev: node-name=NAME is missing or given twice.")
                self._nodes[name] = props
            for name in list(self._nodes):
                self.drives[name] = self._node(name, set())
            for props in spec.drives:
                self._drive(props)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    # ---- disks

    def _null(self, size: int) -> str:
        """The path of an image of zeros that keeps what is written to it."""
        try:
            fd = os.memfd_create("null-co")
            self._fds.append(fd)
            os.ftruncate(fd, size)
        except OSError as e:
            raise HostError(f"a null image of {size} bytes: {e.strerror}", errno=e.errno) from e
        return f"/proc/self/fd/{fd}"

    def _drive(self, props: Props) -> None:
        nr = len(self.drives)
        name = props.take("id", f"drive{nr}")
        if name in self.drives:
            raise ConfigError(f"-drive: there is one called {name} already.")
        kind = props.take("if", "none")
        if kind not in ("none", "virtio"):
            raise ConfigError(f"-drive if={kind}: only none and virtio are possible.")
        if kind == "virtio":
            self.plugged.append(name)
        driver = props.take("format", "") or props.take("driver", "raw")
        path = props.take("file") or props.take("file.filename")
        self.drives[name] = self._leaf(props, driver, path, name)

    def _node(self, name: str, seen: set[str]) -> Drive:
        """A -blockdev node, down to the file it stands on."""
        if name in self.drives:
            return self.drives[name]
        props = self._nodes.get(name)
        if props is None or name in seen:
            raise ConfigError(f"-blockdev: there is no node called {name} to stand on.")
        driver = props.take("driver")
        below = props.take("file")
        if driver == "raw" and below:
            drive = self._node(below, {*seen, name})
            readonly = props.flag_of("read-only", drive.spec.read_only)
            props.drop(*_DRIVE_IGNORED)
            props.done()
            keywords = {**drive.spec.keywords(), "read_only": readonly}
            return Drive(DiskSpec(drive.spec.path, **keywords), uring=drive.uring)  # type: ignore[arg-type]
        if driver == "raw":
            driver = props.take("file.driver", "file")
        return self._leaf(
            props, driver, props.take("filename") or props.take("file.filename"), name
        )

    def _leaf(self, props: Props, driver: str, path: str, name: str) -> Drive:
        if driver not in ("raw", *_FILE_DRIVERS, *_NULL_DRIVERS):
            raise ConfigError(f"{props.flag} {name}: {driver} is not a format vmm reads.")
        readonly = props.flag_of("readonly") or props.flag_of("read-only")
        size = props.size("size", 0) or props.size("file.size", NULL_SIZE)
        cache = _CACHES.get(props.take("cache", "writeback"))
        if cache is None:
            raise ConfigError(f"{props.flag} {name}: cache= is one of {', '.join(_CACHES)}.")
        if props.flag_of("cache.direct"):
            cache = {"writeback": "none", "writethrough": "directsync"}.get(cache, cache)
        uring = props.take("aio", "threads") == "io_uring"
        discard = props.take("discard", "unmap") not in ("ignore", "off")
        werror, rerror = (
            props.take(key, "report").replace("stop", "pause") for key in ("werror", "rerror")
        )
        if props.flag_of("snapshot"):
            raise ConfigError(f"{props.flag} {name}: snapshot=on is not possible; copy the image.")
        props.drop(*_DRIVE_IGNORED)
        props.done()
        if driver in _NULL_DRIVERS or path.startswith(tuple(f"{n}://" for n in _NULL_DRIVERS)):
            path, cache = self._null(size), "writeback"
        if not path:
            raise ConfigError(f"{props.flag} {name}: which file is missing.")
        spec = DiskSpec(
            path,
            read_only=readonly,
            cache=cache,
            discard=discard,
            werror=werror,
            rerror=rerror,
        )
        return Drive(spec, uring=uring)

    def drive(self, name: str) -> Drive:
        """Raises ConfigError."""
        if name not in self.drives:
            raise ConfigError(f"drive={name}: there is no -drive or -blockdev of that name.")
        return self.drives[name]

    # ---- the others

    def console_target(self, name: str) -> str:
        """What vmm.chardev.CharDev takes for a -chardev. Raises ConfigError."""
        props = self.chardevs.get(name)
        if props is None:
            raise ConfigError(f"chardev={name}: there is no -chardev of that name.")
        backend = props.get("backend")
        if backend in ("null", "ringbuf", "memory"):
            return "buffer"
        if backend in ("stdio", "pty"):
            return backend
        if backend == "file" and props.get("path"):
            return props.get("path")
        raise ConfigError(
            f"chardev={name}: a console can be on null, ringbuf, file, pty or stdio, "
            f"not on {backend}."
        )

    def port_target(self, name: str) -> str | None:
        """What vmm.devices.virtio.port.Port takes for a -chardev; None: nobody is there."""
        props = self.chardevs.get(name)
        if props is not None and props.get("backend") == "socket":
            path, server = props.get("path"), props.get("server", "off")
            if not path or server in ("off", "no", "false"):
                raise ConfigError(f"chardev={name}: a port's socket must be path=, server=on.")
            return f"unix:{path}"
        target = self.console_target(name)
        return None if target == "buffer" else target

    def net(self, name: str) -> list[str]:
        """The words of --net for a -netdev. Raises ConfigError."""
        props = self.netdevs.get(name)
        if props is None:
            raise ConfigError(f"netdev={name}: there is no -netdev of that name.")
        props = Props(f"-netdev {name}", dict(props.pairs))
        kind = props.take("type")
        words = {"hubport": ["none"], "socket": ["fd"]}.get(kind, [kind])
        props.drop("hubid", "downscript", "vhost", "net", "dns", "restrict", "ipv4", "ipv6")
        if kind == "user":
            words += _forwards(props)
        elif kind == "tap":
            words[0] = "fd" if props.get("fd") else "tap"
        elif kind not in ("hubport", "socket"):
            raise ConfigError(f"-netdev {kind}: must be user, tap, socket with fd=, or hubport.")
        for key in ("ifname", "script", "queues", "fd"):
            value = props.take(key)
            if value and not (key == "script" and words[0] != "tap"):
                words.append(f"{key}={value}")
        props.done()
        return words

    def memory_file(self, name: str) -> list[str]:
        """The words of --pmem for a -object memory-backend-file. Raises ConfigError."""
        props = self.objects.get(name)
        if props is None or props.get("qom-type") != "memory-backend-file":
            raise ConfigError(
                f"memdev={name}: there is no -object memory-backend-file of that name."
            )
        words = [props.get("mem-path")]
        return [*words, "ro"] if props.get("readonly", "off") == "on" else words

    def entropy(self, name: str) -> None:
        """Raises ConfigError unless the object is a source of the host's randomness."""
        props = self.objects.get(name)
        if props is None:
            raise ConfigError(f"rng={name}: there is no -object of that name.")
        if props.get("qom-type") not in ("rng-random", "rng-builtin"):
            raise ConfigError(f"rng={name}: only rng-random and rng-builtin are possible.")


def _forwards(props: Props) -> list[str]:
    """QEMU's hostfwd=tcp:[ADDR]:HOST-[ADDR]:GUEST as ours. Raises ConfigError."""
    text = props.take("hostfwd")
    if not text:
        return []
    protocol, _, rest = text.partition(":")
    host, dash, guest = rest.partition("-")
    address, colon, port = host.rpartition(":")
    if protocol not in ("tcp", "udp") or not dash or not colon:
        raise ConfigError(f"{props.flag}: hostfwd={text} must be tcp|udp:[ADDR]:PORT-[ADDR]:PORT.")
    ports = f"{address}:{port}" if address else port
    return [f"forward={ports}:{guest.rpartition(':')[2]}/{protocol}"]

"""A disk as the user asks for it: ``--disk PATH[,ro][,cache=none]...``."""

from __future__ import annotations

from vmm import options, values
from vmm.errors import ConfigError
from vmm.options import Field

#: A virtio-blk device id. virtio-v1.3 §5.2.6.
SERIAL_MAX = 20
QUEUES_MAX = 64
CACHES = ("writeback", "none", "writethrough", "directsync")
POLICIES = ("report", "ignore", "pause", "enospc")

#: Other ways to say it, QEMU's among them.
_ALIASES = {
    "readonly": "ro",
    "readonly=on": "ro",
    "direct": "cache=none",
    "werror=stop": "werror=pause",
    "rerror=stop": "rerror=pause",
}


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("must be the path of a raw image or block device")
    return text


def _serial(text: str) -> str:
    if not 0 < len(text) <= SERIAL_MAX or not text.isascii() or "\0" in text:
        raise ValueError(f"must be 1 to {SERIAL_MAX} ASCII characters")
    return text


def _queues(text: str) -> int:
    count = values.parse_count(text)
    if count > QUEUES_MAX:
        raise ValueError(f"is at most {QUEUES_MAX}")
    return count


def _rate(text: str) -> int:
    rate = values.parse_size(text)
    if rate >= 1 << 62:
        raise ValueError("is more than any disk can do")
    return rate


def _operations(text: str) -> int:
    rate = values.parse_count(text)
    if rate >= 1 << 62:
        raise ValueError("is more than any disk can do")
    return rate


FIELDS = (
    Field("path", "A raw image or a block device.", _path, first=True, required=True),
    Field("ro", "The guest may not write.", None, default=False),
    Field("serial", "Up to 20 characters the guest can find the disk by.", _serial,
          metavar="ID", default=""),
    Field("cache", "writeback: through the host's page cache, on the disk when the guest says "
          "flush; none: around the page cache; writethrough: every write is on the disk when it "
          "ends; directsync: both.", choices=CACHES, metavar="MODE", default="writeback"),
    Field("queues", "Virtqueues; 0: one for each vCPU, up to 4.", _queues, metavar="N", default=0),
    Field("block-size", "Bytes of the smallest unit the guest may use; default: what the host's "
          "side wants.", values.parse_count, choices=("512", "4096"), metavar="BYTES", default=0),
    Field("discard", "What the guest no longer needs is given back to the host's file system.",
          None, default=True),
    Field("werror", "When the host cannot write: report it to the guest, ignore it, pause the "
          "guest, or pause it only if no space is left (enospc).", choices=POLICIES,
          metavar="WHAT", default="report"),
    Field("rerror", "The same when the host cannot read.", choices=POLICIES[:3],
          metavar="WHAT", default="report"),
    Field("bps", "Bytes a second, at most, on average.", _rate, metavar="SIZE", default=0),
    Field("bps-burst", "How many bytes may pass at once; default: one second's.", _rate,
          metavar="SIZE", default=0),
    Field("iops", "Requests a second, at most, on average.", _operations, metavar="N", default=0),
    Field("iops-burst", "How many requests may pass at once; default: one second's.", _operations,
          metavar="N", default=0),
)  # fmt: skip


def _attribute(field: Field) -> str:
    return "read_only" if field.name == "ro" else field.name.replace("-", "_")


class DiskSpec:
    """One disk: the path of a raw image or block device, and FIELDS by their names. ``queues``
    and ``block_size`` 0 leave the choice to the machine; rates are bytes and requests a second,
    0 for none. Raises ConfigError."""

    __slots__ = (
        "block_size", "bps", "bps_burst", "cache", "discard", "iops", "iops_burst", "path",
        "queues", "read_only", "rerror", "serial", "werror",
    )  # fmt: skip

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        serial: str = "",
        cache: str = "writeback",
        queues: int = 0,
        block_size: int = 0,
        discard: bool = True,
        werror: str = "report",
        rerror: str = "report",
        bps: int = 0,
        bps_burst: int = 0,
        iops: int = 0,
        iops_burst: int = 0,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.serial = serial
        self.cache = cache
        self.queues = queues
        self.block_size = block_size
        self.discard = discard
        self.werror = werror
        self.rerror = rerror
        self.bps = bps
        self.bps_burst = bps_burst
        self.iops = iops
        self.iops_burst = iops_burst
        _read(str(self))

    def __str__(self) -> str:
        """As on the command line."""
        parts = [self.path]
        for field in FIELDS[1:]:
            value = getattr(self, _attribute(field))
            if value == field.default:
                continue
            if field.parse is None:
                parts.append(field.name + ("" if value else "=off"))
            elif field.parse is _rate:
                parts.append(f"{field.name}={values.format_size(value)}")
            else:
                parts.append(f"{field.name}={value}")
        return options.join(parts)

    def __repr__(self) -> str:
        return f"DiskSpec({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiskSpec) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def keywords(self) -> dict[str, object]:
        """All of it but the path, as the constructor takes it."""
        return {_attribute(field): getattr(self, _attribute(field)) for field in FIELDS[1:]}

    def moved(self, path: str) -> DiskSpec:
        """The same with another path."""
        return DiskSpec(path, **self.keywords())  # type: ignore[arg-type]

    @property
    def direct(self) -> bool:
        """Whether the host's page cache is passed by."""
        return self.cache in ("none", "directsync")

    @property
    def write_back(self) -> bool:
        """Whether a write that ended may be in a cache until the guest says flush."""
        return self.cache in ("writeback", "none")


def _read(text: str) -> options.Options:
    if "\0" in text:
        raise ConfigError(f"--disk {text}: a path cannot hold a NUL byte")
    path, *rest = options.split(text)
    parts = ["path=" + path, *(_ALIASES.get(part, part) for part in rest)]
    try:
        return options.read("disk", FIELDS, options.join(parts))
    except ConfigError as e:
        raise ConfigError(str(e).replace("--disk path=", "--disk ", 1)) from None


def parse_disk(text: str) -> DiskSpec:
    """``PATH[,option...]`` with FIELDS; the first part is the path whatever it looks like, and a
    comma in it is written twice. Raises ConfigError."""
    read = _read(text)
    found = {_attribute(field): getattr(read, field.name) for field in FIELDS}
    return DiskSpec(**found)

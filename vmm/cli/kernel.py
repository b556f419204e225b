"""What a kernel image is, and whether its configuration has what a guest of vmm needs."""

from __future__ import annotations

import os

from vmm.arch import identify, unpack
from vmm.arch.base import native_kernels
from vmm.arch.source import Source
from vmm.errors import BootError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.arch.base import Kernels
    from vmm.cli.doctor import Report

#: Option -> (what is lost without it, whether most guests want it), on every architecture.
OPTIONS = {
    "SMP": ("only one vCPU is used", True),
    "BLK_DEV_INITRD": ("an initial RAM disk (--initrd) is ignored", True),
    "DEVTMPFS": ("/dev is empty unless the guest fills it", True),
    "VIRTIO_PCI": ("no virtio device is seen on PCI, the default; try --transport mmio", True),
    "VIRTIO_MMIO": ("no virtio device is seen with --transport mmio", False),
    "VIRTIO_BLK": ("disks (--disk) are not seen", True),
    "VIRTIO_CONSOLE": ("no hvc0 (--console)", False),
    "HW_RANDOM_VIRTIO": ("no random numbers from the host (--rng)", False),
    "PVPANIC": ("a panic is known from the console's text only", False),
    "EXT4_FS": ("ext4 disks cannot be mounted", False),
    "OVERLAY_FS": ("no overlay mounts", False),
    "VIRTIO_FS": ("no shared directories", False),
}

#: As much of a file as says what it is.
HEAD = 4096
CONFIG_MAX = 4 << 20
#: Around the gzipped configuration in a vmlinux. Linux kernel/configs.c.
IKCONFIG_START = b"IKCFG_ST"
IKCONFIG_END = b"IKCFG_ED"
CHUNK = 1 << 20


def check_kernel(report: Report, path: str) -> None:
    """Findings about one image. Nothing about the file is trusted."""
    try:
        kernels = native_kernels()
        with Source.open(path, "kernel") as source:
            description = kernels.recognise(source)
            if not description:
                what = identify.describe(source.head(HEAD))
                report.add("fail", path, f"no kernel: {what}")
                return
            report.add("ok", path, description)
            _check_config(report, source, path, kernels)
    except (BootError, HostError) as e:
        report.add("fail", path, str(e))


def _check_config(report: Report, source: Source, path: str, kernels: Kernels) -> None:
    version = kernels.release(source)
    found = find_config(source, path, version, kernels)
    if found is None:
        report.add(
            "note",
            "kernel configuration",
            "not found: the image has none inside, and no config file lies beside it",
            f"put config-{version or 'VERSION'} beside the image to have it checked",
        )
        return
    origin, config = found
    report.add("ok", "kernel configuration", f"from {origin}")
    for option, (loss, wanted) in (kernels.OPTIONS | OPTIONS).items():
        value = config.get(f"CONFIG_{option}", "")
        if value == "y":
            report.add("ok", f"CONFIG_{option}", "built in")
        elif value == "m":
            report.add("note", f"CONFIG_{option}", "a module: the initrd must bring it")
        else:
            report.add("warn" if wanted else "note", f"CONFIG_{option}", f"missing: {loss}")


def find_config(
    source: Source, path: str, version: str, kernels: Kernels
) -> tuple[str, dict[str, str]] | None:
    """(where it was, the options) of a kernel's configuration."""
    folder, name = os.path.split(path)
    candidates = [
        os.path.join(folder, "config-" + name.removeprefix(prefix))
        for prefix in kernels.IMAGE_PREFIXES
        if name.startswith(prefix)
    ]
    if version:
        candidates.append(os.path.join(folder, f"config-{version}"))
        candidates.append(f"/boot/config-{version}")
        candidates.append(f"/lib/modules/{version}/config")
    for candidate in candidates:
        try:
            with open(candidate, "rb") as f:
                return candidate, parse_config(f.read(CONFIG_MAX))
        except OSError:
            continue
    inside = embedded_config(_pieces(source, kernels))
    return ("inside the image", parse_config(inside)) if inside else None


def parse_config(text: bytes) -> dict[str, str]:
    """``CONFIG_X=y`` lines; what is not set is not in the result."""
    found = {}
    for line in text.decode("utf-8", "replace").splitlines():
        name, equals, value = line.partition("=")
        if equals and name.startswith("CONFIG_"):
            found[name] = value.strip()
    return found


def _pieces(source: Source, kernels: Kernels) -> Iterator[bytes]:
    """The unpacked kernel, in order. Raises BootError."""
    where = kernels.payload(source)
    if where is None:
        return
    offset, length, packing, limit = where
    if packing:
        yield from unpack.unpack(source, offset, length, packing, limit)
        return
    for at in range(offset, offset + length, CHUNK):
        yield source.read(at, min(CHUNK, offset + length - at))


def embedded_config(pieces: Iterator[bytes]) -> bytes:
    """The configuration that CONFIG_IKCONFIG leaves in a kernel, or nothing."""
    import zlib

    kept = b""
    started = False
    for piece in pieces:
        kept += piece
        if not started:
            at = kept.find(IKCONFIG_START)
            started = at >= 0
            kept = kept[at + len(IKCONFIG_START) :] if started else kept[-len(IKCONFIG_START) :]
        if started:
            packed, end, _ = kept.partition(IKCONFIG_END)
            if end:
                try:
                    return zlib.decompressobj(wbits=31).decompress(packed, CONFIG_MAX)
                except zlib.error:
                    return b""
            if len(kept) > CONFIG_MAX:
                return b""
    return b""

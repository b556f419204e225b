"""Gets what Linux guests are made of from Debian's archive, without being root.

``python -m guests.fetch cloud-amd64 amd64 busybox rootfs fio`` fetches what is named and missing;
``--print-kernel FLAVOUR`` prints the path of a fetched kernel image.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vmm.errors import VmmError
from vmm.guest.kernels import fetch_debian_kernel, fetch_package

KERNELS = ("cloud-amd64", "amd64")


def busybox() -> Path:
    """Debian's statically linked busybox."""
    return Path(fetch_package("busybox-static")) / "bin/busybox"


def fetch(what: str) -> Path:
    if what in KERNELS:
        return Path(fetch_debian_kernel(what).image)
    if what == "busybox":
        return busybox()
    if what == "rootfs":
        from guests.rootfs import debian_image

        return debian_image()
    if what == "fio":
        from guests.fio import fio_archive

        return fio_archive()
    known = ", ".join((*KERNELS, "busybox", "rootfs", "fio"))
    raise SystemExit(f"guests.fetch: {what}: not one of {known}")


def main(argv: list[str]) -> int:
    try:
        if argv[:1] == ["--print-kernel"]:
            print(fetch_debian_kernel(argv[1]).image)
        else:
            for what in argv:
                fetch(what)
    except VmmError as e:
        print(f"guests.fetch: {e}", file=sys.stderr)
        return e.status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

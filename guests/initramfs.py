"""Small root file systems for Linux guests: busybox, a few modules, one script.

``python -m guests.initramfs hello`` builds one and prints where it is. Built archives are kept
below the build directory by a key over all that goes into them.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from guests.fetch import busybox
from vmm.guest.cpio import S_IFCHR, CpioWriter
from vmm.guest.kernels import KernelTree, fetch_debian_kernel
from vmm.guest.modules import ModuleTree, module_name, read_module

BUILD = Path(__file__).resolve().parent.parent / "build" / "initramfs"

APPLETS = (  # by their names in busybox
    "ash awk cat chmod cmp cp cut date dd dmesg echo env free grep halt head hexdump hostname id "
    "insmod kill ln ls lsmod md5sum mkdir mknod mount mv nproc od poweroff printf ps reboot rm sed "
    "seq setsid sh sha256sum sleep sort stat stty switch_root sync tail test time touch tr true "
    "false umount uname wc cttyhack devmem watchdog ip nc ping udhcpc blkdiscard "
    "fstrim mke2fs basename readlink pwd tee"
)

#: What makes virtio devices appear on the cloud kernel.
VIRTIO_MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng")

INIT = """#!/bin/sh
export PATH=/bin HOME=/ TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for m in $(cat /modules); do insmod /lib/$m || echo "insmod $m failed"; done
{script}
"""

SCRIPTS = {
    "hello": """\
echo "vmm: $(nproc) CPU, $(free -m | awk '/Mem/{print $2}') MiB, \
$(ls /sys/bus/virtio/devices | wc -l) virtio devices"
uname -a
poweroff -f
""",
    "shell": """\
echo "A shell in $(uname -sr). 'poweroff -f' ends it, and so does Ctrl-A x."
setsid cttyhack sh
poweroff -f
""",
}


def build(script: str, kernel: KernelTree, modules: tuple[str, ...] = VIRTIO_MODULES) -> Path:
    """An uncompressed initramfs whose /init mounts the usual, loads ``modules`` with what they
    need, and runs ``script`` (busybox sh). Returns its path; built once per content."""
    paths = ModuleTree(kernel.modules_dir).resolve(list(modules))
    init = INIT.replace("{script}", script)
    key = hashlib.sha256("\0".join([init, *paths, APPLETS, str(busybox())]).encode()).hexdigest()
    target = BUILD / f"{key[:16]}.cpio"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    with open(scratch, "wb") as out:
        cpio = CpioWriter(out)
        for name in ("dev", "proc", "sys", "tmp", "mnt"):
            cpio.add_dir(name)
        cpio.add_node("dev/console", S_IFCHR | 0o600, 5, 1)
        cpio.add_file("bin/busybox", busybox().read_bytes(), 0o755)
        for applet in APPLETS.split():
            cpio.add_symlink(f"bin/{applet}", "busybox")
        names = [module_name(path) + ".ko" for path in paths]
        cpio.add_file("modules", "\n".join(names).encode())
        for name, path in zip(names, paths, strict=True):
            cpio.add_file(f"lib/{name}", read_module(path))
        cpio.add_file("init", init.encode(), 0o755)
        cpio.close()
    scratch.rename(target)
    return target


def kernel_tree() -> KernelTree:
    """The stock cloud kernel that Linux guests boot."""
    return fetch_debian_kernel("cloud-amd64")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in SCRIPTS:
        print(f"usage: python -m guests.initramfs {'|'.join(SCRIPTS)}", file=sys.stderr)
        return 2
    print(build(SCRIPTS[sys.argv[1]], kernel_tree()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A small Debian with systemd on an ext4-readable disk image, for boots to ``login:``.

mmdebstrap makes it, as root or not. Kept in the user's cache; a second call does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from vmm.errors import HostError
from vmm.guest.cache import cache_dir

SUITE = "bookworm"
INCLUDE = "systemd-sysv,udev,kmod,login"
SIZE_MIB = 640

#: Root without a password, a name, its disk read-write, nothing to wait for.
HOOKS = (
    'chroot "$1" passwd -d root',
    'echo vmm-guest > "$1/etc/hostname"',
    'echo "/dev/vda / ext4 defaults 0 1" > "$1/etc/fstab"',
    'ln -sf /dev/null "$1/etc/systemd/system/systemd-networkd-wait-online.service"',
    'rm -rf "$1/usr/share/doc" "$1/usr/share/man" "$1/usr/share/locale"',
)


def debian_image() -> Path:
    """The image's path; made on first use, which takes a minute or two."""
    target = Path(cache_dir()) / "rootfs" / f"{SUITE}-1.img"
    if target.exists():
        return target
    if shutil.which("mmdebstrap") is None:
        raise HostError("Building the Debian image needs mmdebstrap: apt-get install mmdebstrap.")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    print(f"vmm: building a Debian {SUITE} image in {target.parent}", file=sys.stderr, flush=True)
    hooks = [f"--customize-hook={hook}" for hook in HOOKS]
    argv = ["mmdebstrap", "--variant=minbase", f"--include={INCLUDE}", "--format=ext2", *hooks]
    if os.geteuid() != 0:
        argv.append("--mode=fakechroot")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        _run([*argv, SUITE, str(scratch)], path)
        os.truncate(scratch, SIZE_MIB << 20)
        _run(["e2fsck", "-fy", str(scratch)], path, ok=(0, 1))
        _run(["resize2fs", str(scratch)], path)
        scratch.rename(target)
    finally:
        scratch.unlink(missing_ok=True)
    print(f"vmm: {target} is ready", file=sys.stderr, flush=True)
    return target


def _run(argv: list[str], path: str, ok: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, "LC_ALL": "C"},
    )
    if done.returncode not in ok:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-12:])
        raise HostError(f"{argv[0]} failed with status {done.returncode}:\n{tail}")

"""Static programs for Linux guests, for what busybox has no applet for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vmm.guest.cpio import CpioWriter

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "tools"


def archive(name: str) -> Path:
    """An initramfs to add to another one: /bin/NAME, built from NAME.c when that is newer."""
    source, target = HERE / f"{name}.c", BUILD / f"{name}.cpio"
    if target.exists() and target.stat().st_mtime >= source.stat().st_mtime:
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / f"{name}.{os.getpid()}.elf"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-s"]
    subprocess.run(["gcc", *flags, "-o", str(program), str(source)], check=True)
    scratch = target.with_suffix(f".{os.getpid()}")
    with open(scratch, "wb") as out:
        cpio = CpioWriter(out)
        cpio.add_dir("bin")
        cpio.add_file(f"bin/{name}", program.read_bytes(), 0o755)
        cpio.close()
    scratch.rename(target)
    program.unlink()
    return target

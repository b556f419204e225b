"""Static programs for Linux guests, for what busybox has no applet for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from vmm.guest.cpio import CpioWriter

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent.parent / "build" / "tools"


def program(name: str) -> Path:
    """Built from NAME.c or the files of NAME/ when one of those is newer."""
    parts = [*HERE.glob(f"{name}.c"), *sorted((HERE / name).glob("*.[ch]"))]
    target = BUILD / name
    if target.exists() and all(target.stat().st_mtime >= p.stat().st_mtime for p in parts):
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    scratch = BUILD / f"{name}.{os.getpid()}.elf"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-s"]
    sources = [str(p) for p in parts if p.suffix == ".c"]
    subprocess.run(["gcc", *flags, "-o", str(scratch), *sources], check=True)
    scratch.rename(target)
    return target


def archive(name: str) -> Path:
    """An initramfs to add to another one: /bin/NAME."""
    built, target = program(name), BUILD / f"{name}.cpio"
    if target.exists() and target.stat().st_mtime >= built.stat().st_mtime:
        return target
    scratch = target.with_suffix(f".{os.getpid()}")
    with open(scratch, "wb") as out:
        cpio = CpioWriter(out)
        cpio.add_dir("bin")
        cpio.add_file(f"bin/{name}", built.read_bytes(), 0o755)
        cpio.close()
    scratch.rename(target)
    return target

"""Boot, in three clocks: process start to first KVM_RUN, to the guest's /init, to exit.

Contenders boot the same stock kernel with the same initramfs, one after another in turn (A B C,
A B C, …), on one machine; the table gives medians and ratios. A shim preloaded into each
process notes the first KVM_RUN; /init says it is there on the serial console.

``python -m bench.boot [--rounds N] [--only NAME]…`` measures here; ``make bench`` measures where
Linux can be booted. vmm, QEMU's microvm and q35, and kvmtool (``lkvm``) when it is on PATH.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from guests.fetch import fetch
from tests.linux import can_boot_linux as can_boot_linux
from vmm.guest.cpio import S_IFCHR, CpioWriter

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"
MARKER = b"<<init>>"
APPEND = "console=ttyS0 quiet panic=-1 reboot=t"
MEMORY_MIB = 512
DEADLINE_S = 120

Argv = Callable[[str, str], list[str]]


def prepare() -> tuple[str, str, str]:
    """(kernel, initramfs, shim); builds what is missing."""
    BUILD.mkdir(parents=True, exist_ok=True)
    shim, init, archive = BUILD / "first_run.so", BUILD / "init", BUILD / "bench.cpio"
    here = Path(__file__).parent
    if not shim.exists():
        cc("-shared", "-fPIC", "-o", str(shim), str(here / "first_run.c"))
    if not archive.exists():
        cc("-static", "-o", str(init), str(here / "init.c"))
        with open(archive, "wb") as out:
            cpio = CpioWriter(out)
            cpio.add_dir("dev")
            cpio.add_node("dev/console", S_IFCHR | 0o600, 5, 1)
            cpio.add_file("init", init.read_bytes(), 0o755)
            cpio.close()
    return str(fetch("cloud-amd64")), str(archive), str(shim)


def cc(*args: str) -> None:
    subprocess.run(["gcc", "-Os", "-Wall", "-Werror", *args], check=True)


def vmm(*extra: str) -> Argv:
    def argv(kernel: str, initrd: str) -> list[str]:
        common = ["--accel", "kvm", "-k", kernel, "-i", initrd, "-m", f"{MEMORY_MIB}M"]
        return [sys.executable, "-m", "vmm", "run", *common, "-a", APPEND, *extra]

    return argv


def qemu(machine: str, *extra: str) -> Argv:
    def argv(kernel: str, initrd: str) -> list[str]:
        return [
            "qemu-system-x86_64", "-M", machine, "-accel", "kvm", "-cpu", "host",
            "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-serial", "stdio", "-kernel", kernel, "-initrd", initrd,
            "-append", APPEND, *extra,
        ]  # fmt: skip

    return argv


def lkvm(kernel: str, initrd: str) -> list[str]:
    return [
        "lkvm", "run", "-k", kernel, "-i", initrd, "-m", str(MEMORY_MIB), "-c", "1",
        "--console", "serial", "--network", "mode=none", "-p", APPEND,
    ]  # fmt: skip


def contenders() -> dict[str, Argv]:
    found: dict[str, Argv] = {
        "vmm": vmm(),
        "vmm minimal": vmm("--transport", "mmio", "--no-rng", "--no-pvpanic"),
    }
    if shutil.which("qemu-system-x86_64"):
        found["qemu microvm"] = qemu("microvm,x-option-roms=off")
        # Its manual's smallest, but for the serial port that tells of /init.
        found["qemu microvm minimal"] = qemu("microvm,x-option-roms=off,pit=off,pic=off,rtc=off")
        found["qemu q35"] = qemu("q35")
    if shutil.which("lkvm"):
        found["kvmtool"] = lkvm
    return found


def measure(argv: list[str], shim: str) -> tuple[float, float, float]:
    """(first KVM_RUN, /init, exit) in seconds after the process was started."""
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "first"
        env = {**os.environ, "LD_PRELOAD": shim, "FIRST_RUN_FILE": str(note)}
        start = time.monotonic()
        with subprocess.Popen(
            argv, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            seen, init = b"", 0.0
            os.set_blocking(process.stdout.fileno(), False)
            while time.monotonic() - start < DEADLINE_S:
                piece = _read(process.stdout.fileno())
                if piece == b"":
                    break
                seen += piece or b""
                if not init and MARKER in seen:
                    init = time.monotonic() - start
            process.kill() if process.poll() is None and not init else None
            process.wait(DEADLINE_S)
            end = time.monotonic() - start
        if not init:
            raise SystemExit(f"bench: {argv[0]} never reached /init; it printed:\n{seen.decode()}")
        return int(note.read_text()) / 1e9 - start, init, end


def _read(fd: int) -> bytes | None:
    """What there is, None when a moment passed without, b"" at the end."""
    import select

    if not select.select([fd], [], [], 1.0)[0]:
        return None
    return os.read(fd, 65536)


def machine() -> str:
    """What the figures were measured on."""
    return (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def report(figures: dict[str, list[tuple[float, float, float]]], base: str) -> None:
    median = {
        name: [statistics.median(run[i] for run in runs) for i in range(3)]
        + [statistics.median(run[1] - run[0] for run in runs)]
        for name, runs in figures.items()
    }
    titles = ("first KVM_RUN", "/init", "exit", "KVM_RUN to /init")
    rounds = len(next(iter(figures.values())))
    print(
        f"\nmedians of {rounds} interleaved rounds, seconds after process start (ratio to {base})"
    )
    print(machine())
    print(f"{'':22}" + "".join(f"{t:>24}" for t in titles))
    for name, row in median.items():
        cells = (f"{v:.3f} ({v / b:.2f})" for v, b in zip(row, median[base], strict=True))
        print(f"{name:22}" + "".join(f"{cell:>24}" for cell in cells))


def main(argv: list[str]) -> int:
    rounds, only = 5, []
    args = iter(argv)
    for arg in args:
        if arg == "--rounds":
            rounds = int(next(args))
        elif arg == "--only":
            only.append(next(args))
        else:
            raise SystemExit(f"bench.boot: unknown argument {arg}")
    kernel, initrd, shim = prepare()
    chosen = {n: a for n, a in contenders().items() if not only or n in only}
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for turn in range(rounds + 1):
        for name, make in chosen.items():
            figure = measure(make(kernel, initrd), shim)
            if turn:  # the first round warms caches and is not counted
                figures[name].append(figure)
            print(f"round {turn} {name}: " + " ".join(f"{v:.3f}" for v in figure), flush=True)
    report(figures, "qemu microvm" if "qemu microvm" in figures else next(iter(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The device side of virtio-blk alone: requests per second with a guest that does next to nothing.

A payload (guests/payload/blkload.S) sets a queue up once and then only moves its index, 128 reads
of 4 KiB behind each notification, from an image in the page cache; what is timed is the VMM's own
work from the notification to the last used entry. It needs no Linux in the guest, so any /dev/kvm
will do, a software KVM too, where the VMM still runs at the host's own speed.

``python -m bench.device [--rounds N] [--batches N]``; vmm and QEMU take turns.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from bench.boot import ROOT, machine

PAYLOAD = "blkload"
IMAGE_BYTES = 16 << 20
BATCH = 128  # of the payload
DEADLINE_S = 120

#: A payload's name, its argument, an image -> the command.
Argv = Callable[[str, str, str], list[str]]


def payload_path(name: str) -> str:
    return str(ROOT / "build" / "guests" / name)


def vmm(*extra: str) -> Argv:
    def argv(payload: str, append: str, image: str) -> list[str]:
        return [
            sys.executable, "-m", "vmm", "run", "--accel", "kvm", "-k", payload_path(payload),
            "--testdev", "-m", "64M", "--no-rng", "-d", image, "-a", append, *extra,
        ]  # fmt: skip

    return argv


def qemu(aio: str, *, iothread: bool = True) -> Argv:
    def argv(payload: str, append: str, image: str) -> list[str]:
        drive = f"if=none,id=d,file={image},format=raw,aio={aio},cache=writeback"
        device = "virtio-blk-pci,drive=d,disable-legacy=on"
        thread = ["-object", "iothread,id=t"] if iothread else []
        return [
            "qemu-system-x86_64", "-M", "q35", "-accel", "kvm", "-m", "64", "-nodefaults",
            "-display", "none", "-serial", "stdio", "-no-reboot",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-device", "pc-testdev",
            "-kernel", payload_path(payload), "-append", append, *thread, "-drive", drive,
            "-device", device + (",iothread=t" if iothread else ""),
        ]  # fmt: skip

    return argv


def contenders() -> dict[str, Argv]:
    found: dict[str, Argv] = {"vmm": vmm()}
    if shutil.which("qemu-system-x86_64"):
        found["qemu threads, iothread"] = qemu("threads")
        found["qemu io_uring, iothread"] = qemu("io_uring")
        found["qemu io_uring, main loop"] = qemu("io_uring", iothread=False)
    return found


def measure(argv: list[str]) -> float:
    """Seconds between the payload's two lines."""
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        said = b""
        began = 0.0
        while line := process.stdout.readline():
            said += line
            if line.endswith(b"blkload: go\r\n") or line.endswith(b"blkload: go\n"):
                began = time.perf_counter()
            elif b" rounds, " in line:
                took = time.perf_counter() - began
                process.wait(DEADLINE_S)
                if f"{BATCH} statuses ok".encode() not in line:
                    break
                return took
    text = said.decode(errors="replace")
    raise SystemExit(f"bench: {argv[0]} did not finish; it printed:\n{text}")


def main(argv: list[str]) -> int:
    rounds, batches = 5, 10000
    args = iter(argv)
    for arg in args:
        if arg == "--rounds":
            rounds = int(next(args))
        elif arg == "--batches":
            batches = int(next(args))
        else:
            raise SystemExit(f"bench.device: unknown argument {arg}")
    rates: dict[str, list[float]] = {name: [] for name in contenders()}
    with tempfile.NamedTemporaryFile(suffix=".img") as image:
        image.write(os.urandom(IMAGE_BYTES))
        image.flush()
        for turn in range(rounds):
            for name, make in contenders().items():
                took = measure(make(PAYLOAD, str(batches), image.name))
                rates[name].append(batches * BATCH / took)
                print(f"round {turn} {name}: {rates[name][-1] / 1000:.0f} k/s", flush=True)
    print(
        f"\n4 KiB cached reads, {BATCH} a notification: medians of {rounds} interleaved rounds, "
        f"thousand requests a second (ratio of vmm to it)\n{machine()}"
    )
    ours = statistics.median(rates["vmm"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:28}{median / 1000:10.0f} ({ours / median:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

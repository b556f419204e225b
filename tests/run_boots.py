"""Runs tests/boot where Linux boots: here, or inside the emulated host that vmm brings along.

``python -m tests.run_boots [pytest arguments]``
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guests.fetch import fetch
from tests.linux import can_boot_linux

ROOT = Path(__file__).resolve().parent.parent
GIB_KB = 1 << 20
#: What conftest's last line says.
COUNT = "Linux boots: "
#: vmm's own status: the emulated host died, or could not be started.
HOST_FAILED = 125
#: An emulated host's own kernel panics now and then, once in some fifty to a hundred boots.
ATTEMPTS = 3
#: Files with more boots than one emulated host should see: what -k chooses for each.
SPLIT = {"tests/boot/test_matrix.py": ("bzimage or elf", "pvh", "many")}

_showing = threading.Lock()


def main() -> int:
    # What the guests are made of is made here, where it is kept and where it is fast.
    for what in ("cloud-amd64", "amd64", "busybox", "rootfs", "fio"):
        fetch(what)
    chosen = [a for a in sys.argv[1:] if a.startswith("tests/")]
    flags = [a for a in sys.argv[1:] if a not in chosen]
    # A run for each file, so that each begins in an emulated host that is as good as new.
    parts = [chosen] if chosen else all_parts()
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    emulated = not can_boot_linux()
    memory, workers = share_of_memory()
    if emulated:
        print("vmm: this host's KVM cannot boot Linux; using an emulated host", flush=True)
    at_once = workers if emulated and len(parts) > 1 else 1
    with ThreadPoolExecutor(at_once) as pool:
        ends = list(pool.map(lambda part: see_through([*flags, *part], memory, at_once > 1), parts))
    total = sum(boots for _, boots in ends)
    print(f"Linux boots in all: {total}")
    if not total:
        print("run_boots: no Linux booted")
    return max(abs(status) for status, _ in ends) or int(not total)


def all_parts() -> list[list[str]]:
    """What pytest gets for each run; those that take long first, so that none is left alone."""
    files = sorted((ROOT / "tests/boot").glob("test_*.py"), key=lambda p: -p.stat().st_size)
    names = [str(path.relative_to(ROOT)) for path in files]
    parts = [[file, "-k", word] for file, words in SPLIT.items() for word in words]
    return parts + [[name] for name in names if name not in SPLIT]


def share_of_memory() -> tuple[str, int]:
    """Of an emulated host, and how many there may be at once. The largest guest has 5 GiB and huge
    pages, what tests write is in memory too, and a host that is short of memory reads its programs
    again and again. Each keeps two processors busy: on two, two of them took as long as one after
    the other."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / GIB_KB
    if free > 20 and len(os.sched_getaffinity(0)) > 3:
        return "10G", 2
    return ("10G" if free > 13 else "6G"), 1


def see_through(arguments: list[str], memory: str, quiet: bool) -> tuple[int, int]:
    """As ``run``, again where the emulated host died."""
    status, boots = run(arguments, memory, quiet)
    for _ in range(ATTEMPTS - 1):
        if can_boot_linux() or status != HOST_FAILED:
            break
        print(f"run_boots: the emulated host died; again: {' '.join(arguments)}", flush=True)
        status, boots = run(arguments, memory, quiet)
    return status, boots


def run(arguments: list[str], memory: str, quiet: bool) -> tuple[int, int]:
    """pytest with these arguments, where Linux boots: its status, and how many guests did. With
    ``quiet`` what it prints comes in one piece, as others print too."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    # Temporary files are in the emulated host's memory.
    tests += ["-o", "tmp_path_retention_policy=failed", *arguments]
    environment = dict(os.environ)
    if not can_boot_linux():
        words = ("VMM_", "PYTHON", "PYTEST_", "CI")
        env = [f"--env={name}" for name in environment if name.startswith(words)]
        nested = [sys.executable, "-m", "vmm", "nested", "--memory", memory, *env, "--"]
        tests = nested + tests
    said = bytearray()
    stderr = subprocess.STDOUT if quiet else None
    with subprocess.Popen(
        tests, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=stderr,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 65536):
            said += piece
            if not quiet:
                show(piece)
    if quiet:
        show(f"\n{' '.join(arguments)}\n".encode() + said)
    lines = said.decode(errors="replace").splitlines()
    counts = [int(line.removeprefix(COUNT)) for line in lines if line.startswith(COUNT)]
    return process.returncode, sum(counts)


def show(text: bytes) -> None:
    with _showing:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())

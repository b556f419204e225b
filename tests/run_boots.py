"""Runs tests/boot where Linux boots: here, or inside the emulated host that vmm brings along.

``python -m tests.run_boots [pytest arguments]``
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
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
SPLIT = {"tests/boot/test_matrix.py": ("bzimage", "elf", "pvh", "many")}


def main() -> int:
    # What the guests are made of is made here, where it is kept and where it is fast.
    for what in ("cloud-amd64", "amd64", "busybox", "rootfs", "fio"):
        fetch(what)
    chosen = [a for a in sys.argv[1:] if a.startswith("tests/")]
    flags = [a for a in sys.argv[1:] if a not in chosen]
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/boot").glob("test_*.py"))
    # A run for each file, so that each begins in an emulated host that is as good as new.
    parts = [chosen]
    if not chosen:
        parts = [[file] for file in files if file not in SPLIT]
        parts += [[file, "-k", word] for file, words in SPLIT.items() for word in words]
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    emulated = not can_boot_linux()
    if emulated:
        print("vmm: this host's KVM cannot boot Linux; using an emulated host", flush=True)
    worst = total = 0
    for part in parts:
        status, boots = run([*flags, *part])
        for _ in range(ATTEMPTS - 1):
            if not emulated or status != HOST_FAILED:
                break
            print(f"run_boots: the emulated host died; again: {' '.join(part)}", flush=True)
            status, boots = run([*flags, *part])
        worst, total = max(worst, abs(status)), total + boots
    print(f"Linux boots in all: {total}")
    if not total:
        print("run_boots: no Linux booted")
    return worst or int(not total)


def host_memory() -> str:
    """Of the emulated host. The largest guest has 5 GiB and huge pages, what tests write is in
    memory too, and a host that is short of memory reads its programs again and again."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return "10G" if free_kb > 13 * GIB_KB else "6G"


def run(arguments: list[str]) -> tuple[int, int]:
    """pytest with these arguments, where Linux boots: its status, and how many guests did."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    # Temporary files are in the emulated host's memory.
    tests += ["-o", "tmp_path_retention_policy=failed", *arguments]
    environment = dict(os.environ)
    if not can_boot_linux():
        words = ("VMM_", "PYTHON", "PYTEST_", "CI")
        env = [f"--env={name}" for name in environment if name.startswith(words)]
        nested = [sys.executable, "-m", "vmm", "nested", "--memory", host_memory(), *env, "--"]
        tests = nested + tests
    said = bytearray()
    with subprocess.Popen(tests, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 65536):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            said += piece
    lines = said.decode(errors="replace").splitlines()
    counts = [int(line.removeprefix(COUNT)) for line in lines if line.startswith(COUNT)]
    return process.returncode, sum(counts)


if __name__ == "__main__":
    sys.exit(main())

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
MATRIX = "tests/boot/test_matrix.py"


def main() -> int:
    # What the guests are made of is made here, where it is kept and where it is fast.
    for what in ("cloud-amd64", "amd64", "busybox", "rootfs", "fio"):
        fetch(what)
    chosen = [a for a in sys.argv[1:] if a.startswith("tests/")]
    flags = [a for a in sys.argv[1:] if a not in chosen]
    # Two runs, so that the second begins in an emulated host that is as good as new.
    parts = [chosen] if chosen else [["tests/boot", f"--ignore={MATRIX}"], [MATRIX]]
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    if not can_boot_linux():
        print("vmm: this host's KVM cannot boot Linux; using an emulated host", flush=True)
    return max(run([*flags, *part]) for part in parts)


def host_memory() -> str:
    """Of the emulated host. The largest guest has 5 GiB and huge pages, what tests write is in
    memory too, and a host that is short of memory reads its programs again and again."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return "10G" if free_kb > 13 * GIB_KB else "6G"


def run(arguments: list[str]) -> int:
    """pytest with these arguments, where Linux boots."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    # Temporary files are in the emulated host's memory.
    tests += ["-o", "tmp_path_retention_policy=failed", *arguments]
    environment = {**os.environ, "VMM_REQUIRE": "boot"}
    if can_boot_linux():
        return subprocess.call(tests, cwd=ROOT, env=environment)
    names = [name for name in environment if name.startswith(("VMM_", "PYTHON", "PYTEST_", "CI"))]
    env = [f"--env={name}" for name in names]
    command = [sys.executable, "-m", "vmm", "nested", "--memory", host_memory(), *env, "--", *tests]
    return subprocess.call(command, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())

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
MATRIX = "tests/boot/test_matrix.py"


def main() -> int:
    # What the guests are made of is made here, where it is kept and where it is fast.
    for what in ("cloud-amd64", "busybox", "rootfs"):
        fetch(what)
    chosen = [a for a in sys.argv[1:] if a.startswith("tests/")]
    flags = [a for a in sys.argv[1:] if a not in chosen]
    # Two runs, so that the second begins in an emulated host that is as good as new.
    parts = [chosen] if chosen else [["tests/boot", f"--ignore={MATRIX}"], [MATRIX]]
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    if not can_boot_linux():
        print("vmm: this host's KVM cannot boot Linux; using an emulated host", flush=True)
    return max(run([*flags, *part]) for part in parts)


def run(arguments: list[str]) -> int:
    """pytest with these arguments, where Linux boots."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "VMM_REQUIRE": "boot"}
    if can_boot_linux():
        return subprocess.call(tests, cwd=ROOT, env=environment)
    names = [name for name in environment if name.startswith(("VMM_", "PYTHON", "CI"))]
    env = [f"--env={name}" for name in names]
    command = [sys.executable, "-m", "vmm", "nested", "--memory", "6G", *env, "--", *tests]
    return subprocess.call(command, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())

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


def main() -> int:
    # What the guests are made of is made here, where it is kept and where it is fast.
    for what in ("cloud-amd64", "busybox", "rootfs"):
        fetch(what)
    chosen = sys.argv[1:] if any(a.startswith("tests/") for a in sys.argv[1:]) else ["tests/boot"]
    flags = [a for a in sys.argv[1:] if a not in chosen]
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, *chosen]
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    environment = {**os.environ, "VMM_REQUIRE": "boot"}
    if can_boot_linux():
        return subprocess.call(tests, cwd=ROOT, env=environment)
    print(
        "vmm: this host's KVM cannot boot Linux; running the boots in an emulated host", flush=True
    )
    names = [name for name in environment if name.startswith(("VMM_", "PYTHON", "CI"))]
    env = [f"--env={name}" for name in names]
    command = [sys.executable, "-m", "vmm", "nested", "--memory", "6G", *env, "--", *tests]
    return subprocess.call(command, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())

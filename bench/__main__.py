"""Runs the benchmarks where Linux boots: here, or in the emulated host that vmm brings along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench import boot

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    argv = sys.argv[1:]
    boot.prepare()
    if boot.can_boot_linux():
        return boot.main(argv)
    print("bench: this host's KVM cannot boot Linux; measuring inside an emulated host", flush=True)
    inner = [sys.executable, "-m", "bench.boot", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vmm", "nested", "--", *inner]
    return subprocess.call(command, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())

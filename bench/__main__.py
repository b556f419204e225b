"""Runs a benchmark where Linux boots: here, or in the emulated host that vmm brings along.

``python -m bench [boot|net|blk|device|latency|soak] [argument]…``; default boot. ``device`` and
``latency`` run here, as they need no Linux guest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from tests.linux import can_boot_linux

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("boot", "net", "blk", "device", "latency", "soak")
HERE = ("device", "latency")


def main() -> int:
    argv = sys.argv[1:]
    name = argv.pop(0) if argv and argv[0] in NAMES else NAMES[0]
    bench = import_module(f"bench.{name}")
    if hasattr(bench, "prepare"):
        bench.prepare()
    if name in HERE or can_boot_linux():
        return int(bench.main(argv))
    print("bench: this host's KVM cannot boot Linux; measuring inside an emulated host", flush=True)
    inner = [sys.executable, "-m", f"bench.{name}", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vmm", "nested", "--", *inner]
    return subprocess.call(command, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())

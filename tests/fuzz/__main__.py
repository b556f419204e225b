"""Fuzzes virtio devices: ``python -m tests.fuzz --cases 1000000 --device rng``.

Under the sanitizers: ``tools/asan.sh -m tests.fuzz --cases ...``. A finding is printed with the
command that shows it again.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.dice import Dice, Finding
from tests.fuzz.executor import Executor, InProcess
from tests.fuzz.qtest import OverSocket
from tests.fuzz.session import Session
from tests.fuzz.targets import Target, targets

#: What a device may come to need while it is fuzzed; a leak of one page a session is more.
MEMORY_MIB = 48


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def fuzz(
    name: str,
    target: Target,
    transport: str,
    cases: int,
    seed: str,
    start: int,
    seconds: float,
    *,
    qtest: bool = False,
) -> int:
    """How many cases were run; ``qtest``: in a process that is spoken to. Raises Finding."""
    done = nr = 0
    before = fds()
    # Flushes of a real disk would be most of the time.
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as scratch:
        executor: Executor
        if qtest:
            executor = OverSocket(name, transport, Path(scratch))
        else:
            executor = InProcess(target.make(Path(scratch)), transport)
        began, used = time.monotonic(), resident_mib()
        log: list[str] = []
        try:
            while done < cases and time.monotonic() - began < seconds:
                session = Session(executor, target, Dice(f"{seed}/{name}/{start + nr}"))
                log = session.log
                done += session.run()
                nr += 1
        except BaseException as e:
            print(f"finding: {type(e).__name__}: {e}\n  " + "\n  ".join(log))
            again = "--qtest " * qtest + f"--device {name} --transport {transport} --seed {seed}"
            print(f"again: python -m tests.fuzz {again} --start {start + nr} --cases 1")
            raise
        finally:
            executor.close()
        took = time.monotonic() - began
        grown = resident_mib() - used
        rate = done / took if took else 0.0
        print(
            f"{name:12} {transport:5} {done:8} cases {nr:7} sessions {rate:8.0f} cases/s "
            f"{grown:+6.1f} MiB seed {seed}",
            flush=True,
        )
        if grown > MEMORY_MIB and "asan" not in os.environ.get("LD_PRELOAD", ""):
            raise Finding(f"{name}: {grown:.0f} MiB more than at the start")
    if fds() > before:
        raise Finding(f"{name}: {fds() - before} file descriptors were left open")
    return done


def main() -> int:
    known = targets()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of each device and transport")
    parser.add_argument("--device", action="append", choices=sorted(known), help="default: all")
    parser.add_argument("--transport", action="append", choices=("mmio", "pci"))
    parser.add_argument("--qtest", action="store_true", help="devices in a process of their own")
    parser.add_argument("--seed", default=None)
    parser.add_argument("--start", type=int, default=0, help="the first session's number")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, each")
    options = parser.parse_args()
    # What there is by now stays, and of what comes little is in cycles.
    gc.freeze()
    gc.set_threshold(100_000)
    seed = options.seed or os.urandom(4).hex()
    print(f"seed {seed}", flush=True)
    failed = 0
    for name in options.device or targets(here=not options.qtest):
        for transport in options.transport or ("mmio", "pci"):
            try:
                fuzz(
                    name,
                    known[name],
                    transport,
                    options.cases,
                    seed,
                    options.start,
                    options.seconds,
                    qtest=options.qtest,
                )
            except Finding:
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What one exit, and one request from kick to answer, costs: median and 99th percentile.

A payload (guests/payload/latency.S) times each by the time stamp counter: an exit that C answers
(COM1's line status), one that Python answers here (port 0x80), a 4 KiB cached read waited for by
looking, and one waited for halted until the interrupt. It needs no Linux in the guest, so any
/dev/kvm will do, a software KVM too.

vmm and QEMU (with an iothread) take turns. Two rows tell what Python may cost: vmm in a process
that keeps a Python thread busy, and, as that also takes a CPU away, vmm beside a busy process.

``python -m bench.latency [--rounds N] [--times N]``
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import threading

from bench.boot import ROOT, machine
from bench.device import DEADLINE_S, IMAGE_BYTES, Argv, contenders, payload_path, vmm

PAYLOAD = "latency"
#: The payload's letter -> the row's name.
ROWS = {
    "u": "exit, answered in C",
    "p": "exit, answered in Python",
    "k": "kick to used ring",
    "i": "kick to interrupt handler",
}
SPIN = "while True: pass"
LINE = re.compile(r"latency: \d+ times, p50 (\d+), p99 (\d+) cycles")


def with_busy_thread(payload: str, append: str, image: str) -> list[str]:
    """The command of a process that runs the machine and keeps the GIL busy as well."""
    return [sys.executable, "-m", "bench.latency", "--inside", payload, append, image]


def inside(payload: str, append: str, image: str) -> int:
    from vmm import Machine

    threading.Thread(target=exec, args=(SPIN, {}), daemon=True).start()
    with Machine(
        kernel=payload_path(payload), append=append, memory="64M", testdev=True, rng=False,
        disks=[image],
    ) as vm:  # fmt: skip
        result = vm.wait(DEADLINE_S)
    print(result.console)
    return 0


def measure(argv: list[str], *, beside: bool) -> tuple[int, int]:
    """Cycles: p50 and p99. With ``beside`` another process is busy meanwhile."""
    other = subprocess.Popen([sys.executable, "-c", SPIN]) if beside else None
    try:
        done = subprocess.run(
            argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S,
            check=False,
        )  # fmt: skip
    finally:
        if other is not None:
            other.kill()
            other.wait()
    found = LINE.search(done.stdout.decode(errors="replace"))
    if found is None:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise SystemExit(f"bench: {' '.join(argv)}\nmeasured nothing; it printed:\n{said}")
    return int(found[1]), int(found[2])


def chosen() -> dict[str, tuple[Argv, bool]]:
    """By name: the command, and whether another process is to be busy beside it."""
    found: dict[str, tuple[Argv, bool]] = {"vmm": (vmm(), False)}
    for name, make in contenders().items():
        if name == "qemu io_uring, iothread":
            found[name] = (make, False)
    found["vmm, busy process beside"] = (vmm(), True)
    found["vmm, busy Python thread"] = (with_busy_thread, False)
    return found


def main(argv: list[str]) -> int:
    if argv[:1] == ["--inside"]:
        return inside(*argv[1:4])
    options = {"--rounds": "5", "--times": "20000"}
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        if flag not in options:
            raise SystemExit(f"bench.latency: unknown argument {flag}")
        options[flag] = value
    rounds = int(options["--rounds"])
    runs = chosen()
    got: dict[str, dict[str, list[tuple[int, int]]]] = {n: {r: [] for r in ROWS} for n in runs}
    with tempfile.NamedTemporaryFile(suffix=".img") as image:
        image.write(bytes(IMAGE_BYTES))
        image.flush()
        for turn in range(rounds):
            for row in ROWS:
                for name, (make, beside) in runs.items():
                    command = make(PAYLOAD, options["--times"] + row, image.name)
                    figures = measure(command, beside=beside)
                    got[name][row].append(figures)
                    print(f"round {turn} {ROWS[row]}, {name}: {figures}", flush=True)
    print(
        f"\nthousand cycles, p50 and p99: medians of {rounds} interleaved rounds of "
        f"{options['--times']} each (ratio of vmm to it)\n{machine()}"
    )
    for row, title in ROWS.items():
        print(title)
        ours = [statistics.median(column) for column in zip(*got["vmm"][row], strict=True)]
        for name in got:
            theirs = [statistics.median(column) for column in zip(*got[name][row], strict=True)]
            cells = (
                f"{its / 1000:10.1f} ({mine / its:.2f})"
                for mine, its in zip(ours, theirs, strict=True)
            )
            print(f"  {name:28}" + "".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

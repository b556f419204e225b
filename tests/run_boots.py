"""Runs tests/boot where Linux boots: here, or inside the emulated host that vmm brings along.

``python -m tests.run_boots [pytest arguments]``
"""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from guests.fetch import fetch
from tests.linux import can_boot_linux

ROOT = Path(__file__).resolve().parent.parent
GIB_KB = 1 << 20
#: What conftest's last line says.
COUNT = "Linux boots: "
#: vmm's own statuses: the emulated host died, hung or could not be started; it took too long.
HOST_FAILED = (125, 124)
#: An emulated host's own kernel panics or hangs now and then, once in some fifty to a hundred
#: boots. Another goes on where it was.
ATTEMPTS = 4
#: Tests for each, so that none gets old; starting pytest in one takes as long as some boots.
TESTS_A_HOST = 32
#: What none should need, even on a busy machine.
HOST_LIMIT = "25m"

#: No caches, and no examples: importing them takes longer in an emulated host than a boot.
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]

_showing = threading.Lock()


def main() -> int:
    # What the guests are made of is made here, where it is kept and where it is fast.
    for what in ("cloud-amd64", "amd64", "busybox", "rootfs", "fio"):
        fetch(what)
    chosen = [a for a in sys.argv[1:] if a.startswith("tests/")]
    flags = [a for a in sys.argv[1:] if a not in chosen]
    compileall.compile_dir(ROOT / "vmm", quiet=1)
    tests = collect(chosen or ["tests/boot"], flags)
    emulated = not can_boot_linux()
    memory, workers = share_of_memory()
    share = TESTS_A_HOST if emulated else len(tests)
    parts = [tests[at : at + share] for at in range(0, len(tests), share)]
    if emulated:
        print("vmm: this host's KVM cannot boot Linux; using an emulated host", flush=True)
    at_once = workers if emulated and len(parts) > 1 else 1
    with ThreadPoolExecutor(at_once) as pool:
        ends = list(pool.map(lambda part: see_through(part, flags, memory, at_once > 1), parts))
    total = sum(boots for _, boots in ends)
    print(f"Linux boots in all: {total}")
    if not total:
        print("run_boots: no Linux booted")
    return max((abs(status) for status, _ in ends), default=0) or int(not total)


def collect(chosen: list[str], flags: list[str]) -> list[str]:
    """The tests by name. Collecting here also leaves their compiled form for the hosts to find."""
    argv = [*PYTEST, "-q", "--collect-only", *flags, *chosen]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"run_boots: the tests cannot be collected\n{done.stdout}")
    return [line for line in done.stdout.splitlines() if "::" in line]


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


def see_through(tests: list[str], flags: list[str], memory: str, quiet: bool) -> tuple[int, int]:
    """As ``run``, for those that are left, as long as emulated hosts die over them."""
    total = status = failed = 0
    with tempfile.TemporaryDirectory(prefix="vmm-boots-") as scratch:
        # The tests may run as somebody else inside, and this is all they write to outside.
        done = Path(scratch, "done")
        done.touch()
        for _ in range(ATTEMPTS):
            lines = [line.split("\t") for line in done.read_text().splitlines()]
            failed = max((int(bad) for _, bad in lines), default=0)
            over = {name for name, _ in lines}
            left = [name for name in tests if name not in over]
            if not left:
                return failed, total
            Path(scratch, "tests").write_text("\n".join(left) + "\n")
            status, boots = run(Path(scratch), flags, memory, quiet)
            total += boots
            if can_boot_linux() or status not in HOST_FAILED:
                break
            print(f"run_boots: the emulated host ended with status {status}", flush=True)
    return status or failed, total


def run(scratch: Path, flags: list[str], memory: str, quiet: bool) -> tuple[int, int]:
    """pytest with the tests of scratch/tests, where Linux boots: its status, and how many guests
    did. With ``quiet`` what it prints comes in one piece, as others print too."""
    # Temporary files are in the emulated host's memory.
    tests = [*PYTEST, "-o", "tmp_path_retention_policy=failed", *flags, f"@{scratch}/tests"]
    environment = {**os.environ, "VMM_BOOTS_DONE": f"{scratch}/done"}
    if not can_boot_linux():
        words = ("VMM_", "PYTHON", "PYTEST_", "CI")
        env = [f"--env={name}" for name in environment if name.startswith(words)]
        nested = [sys.executable, "-m", "vmm", "nested", "--memory", memory, *env]
        tests = [*nested, "--timeout", HOST_LIMIT, "--rw", str(scratch), "--", *tests]
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
        show(bytes(said))
    lines = said.decode(errors="replace").splitlines()
    counts = [int(line.removeprefix(COUNT)) for line in lines if line.startswith(COUNT)]
    return process.returncode, sum(counts)


def show(text: bytes) -> None:
    with _showing:
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())

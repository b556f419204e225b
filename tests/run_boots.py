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
TESTS_A_HOST = 16
#: What takes long comes first, so that no host is alone with it in the end.
FIRST = ("test_login", "test_vhost_user", "test_disks", "test_matrix")
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
    memory, workers = hosts_at_once()
    share = TESTS_A_HOST if emulated else len(tests)
    parts = [tests[at : at + share] for at in range(0, len(tests), share)]
    if emulated:
        print("vmm: this host's KVM cannot boot Linux; using an emulated host", flush=True)
    with ThreadPoolExecutor(workers if emulated else 1) as pool:
        ends = list(
            pool.map(lambda item: see_through(*item, flags, memory), enumerate(parts, start=1))
        )
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
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    return sorted(tests, key=lambda test: not any(f"/{name}.py" in test for name in FIRST))


def hosts_at_once() -> tuple[str, int]:
    """The memory of an emulated host, and how many there are at once: one for each processor.

    One CPU each, as emulating two takes half as much again for the same work, and what hung so far
    was the one waiting for the other. The largest guest has 5 GiB and huge pages, what tests write
    is in memory too, and a host that is short of memory reads its programs again and again.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / GIB_KB
    memory = 10 if free > 13 else 6
    return f"{memory}G", max(1, min(len(os.sched_getaffinity(0)), int(free / memory), 4))


def see_through(number: int, tests: list[str], flags: list[str], memory: str) -> tuple[int, int]:
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
            status, boots = run(number, Path(scratch), flags, memory)
            total += boots
            if can_boot_linux() or status not in HOST_FAILED:
                break
            show(f"{number}: the emulated host ended with status {status}; another goes on\n")
    return status or failed, total


def run(number: int, scratch: Path, flags: list[str], memory: str) -> tuple[int, int]:
    """pytest with the tests of scratch/tests, where Linux boots: its status, and how many guests
    did. Its lines are shown as they end, and each says which host it is from."""
    # Temporary files are in the emulated host's memory.
    tests = [*PYTEST, "-o", "tmp_path_retention_policy=failed", *flags, f"@{scratch}/tests"]
    environment = {**os.environ, "VMM_BOOTS_DONE": f"{scratch}/done"}
    if not can_boot_linux():
        words = ("VMM_", "PYTHON", "PYTEST_", "CI")
        env = [f"--env={name}" for name in environment if name.startswith(words)]
        nested = [sys.executable, "-m", "vmm", "nested", "--memory", memory, "--cpus", "1", *env]
        tests = [*nested, "--timeout", HOST_LIMIT, "--rw", str(scratch), "--", *tests]
    boots = 0
    with subprocess.Popen(
        tests,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            show(f"{number}: {line}" if line.strip() else line)
            if line.startswith(COUNT):
                boots = int(line.removeprefix(COUNT))
    return process.returncode, boots


def show(text: str) -> None:
    with _showing:
        print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""One way to run ``vmm nested`` in a test, and to see that nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm.nested import usable_hint

ROOT = Path(__file__).resolve().parent.parent.parent
#: A quiet machine needs 4 s to the command; a loaded one many times that.
DEADLINE = 180

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture(scope="session", autouse=True)
def _parts() -> None:
    missing = usable_hint()
    if missing is not None:
        pytest.skip(missing)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "vmm", "nested", *args]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


class Done:
    def __init__(self, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out, err

    def __repr__(self) -> str:
        return f"Done({self.status}, {self.out[-2000:]!r}, {self.err[-4000:]!r})"


def nested(*args: str, stdin: bytes | None = None, cwd: Path | None = None) -> Done:
    """Run to the end; stdin is /dev/null when not given."""
    done = subprocess.run(
        command(*args),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        cwd=cwd,
        env=environment(),
        timeout=DEADLINE,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def qemu_children(pid: int) -> list[int]:
    """QEMU processes whose parent is ``pid``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                name = (entry / "comm").read_text()
            except OSError:
                continue
            if int(fields[1]) == pid and name.startswith("qemu"):
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    """A zombie that nobody buried yet is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start ``vmm nested`` with pipes, and kill it in the end whatever the test did."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*args: str, **options: object) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        settings = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "bufsize": 0}
        settings |= {"env": environment(), **options}
        process = subprocess.Popen(command(*args), **settings)  # type: ignore[call-overload]
        started.append(process)
        return process

    yield run
    for process in started:
        with process:  # closes the pipes, then waits
            process.kill()

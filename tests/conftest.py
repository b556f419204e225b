"""What every test shares: a count of guests that really ran, and reasons for what did not.

A test class that skips entirely must not look green: with VMM_REQUIRE="payload boot" the run
fails unless at least one test of each class ran. The closing lines say how many did.
"""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
#: Classes of tests by directory, and what they are called in the summary.
CLASSES = {"payload": "payload tests", "boot": "Linux boot tests", "nested": "nesting tests"}

_ran: dict[str, int] = {}
_skipped: dict[str, int] = {}
_boots = [0]


def pytest_configure() -> None:
    # Some tests hold thousands of descriptors; a user's soft limit is often 1024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    # A shell starts background jobs with SIGINT ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def class_of(path: str) -> str | None:
    parts = Path(path).parts
    return next((name for name in CLASSES if name in parts), None)


def count_boot() -> None:
    """A Linux guest reached user space."""
    _boots[0] += 1


def kvm_problem() -> str | None:
    """Why /dev/kvm cannot be used here, or None."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return f"/dev/kvm: {e.strerror}"
    return None


@pytest.fixture(scope="session")
def kvm() -> str:
    problem = kvm_problem()
    if problem:
        pytest.skip(problem)
    return "/dev/kvm"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = class_of(report.nodeid.split("::")[0])
    if name is None:
        return
    if report.skipped:
        _skipped[name] = _skipped.get(name, 0) + 1
    elif report.when == "call":
        _ran[name] = _ran.get(name, 0) + 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, words in CLASSES.items():
        if name in _ran or name in _skipped:
            terminalreporter.write_line(
                f"{words}: {_ran.get(name, 0)} ran, {_skipped.get(name, 0)} skipped"
            )
    if _boots[0]:
        terminalreporter.write_line(f"Linux boots: {_boots[0]}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    missing = [n for n in os.environ.get("VMM_REQUIRE", "").split() if not _ran.get(n)]
    if missing and exitstatus == 0:
        print(f"\nno test of these classes ran: {', '.join(missing)}")
        session.exitstatus = 1

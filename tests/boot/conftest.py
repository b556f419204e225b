"""One way to boot Linux in a test; failures show console, registers and last exits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.fetch import fetch
from guests.initramfs import build, kernel_tree
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT, can_boot_linux
from vmm import Machine, RunResult

#: /init of every test says this first.
UP = "vmm-guest: up"

Boot = Callable[..., "Booted"]

_failed: set[str] = set()


class Booted:
    """A machine that was started, and how it ended."""

    def __init__(self, machine: Machine, result: RunResult) -> None:
        self.machine = machine
        self.result = result
        self.console = result.console

    def ok(self) -> Booted:
        """It reached user space and powered off by itself."""
        assert UP in self.console, self.report()
        assert (self.result.reason, self.result.status) == ("poweroff", 0), self.report()
        return self

    def value(self, name: str) -> str:
        """What the guest printed as ``name=value``."""
        for line in self.console.splitlines():
            if line.strip().startswith(f"{name}="):
                return line.strip().split("=", 1)[1]
        raise AssertionError(f"no {name}= on the console\n{self.report()}")

    def report(self) -> str:
        r = self.result
        return f"{r.reason} {r.status}: {r.message}\n{r.diagnosis}\n---- console\n{r.console}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A boot has its own deadline; a test of some boots gets more than an ordinary test."""
    for item in items:
        if "boot" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(2 * BOOT_TIMEOUT))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Outlives an emulated host that dies: tests.run_boots goes on with those that are left."""
    path = os.environ.get("VMM_BOOTS_DONE")
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{nodeid}\t{int(nodeid in _failed)}\n")


@pytest.fixture(scope="session", autouse=True)
def _linux() -> None:
    if not can_boot_linux():
        pytest.skip("no KVM that boots Linux here (no vmx/svm, or no /dev/kvm): make test-nested")


@pytest.fixture(scope="session")
def kernel() -> str:
    return str(fetch("cloud-amd64"))


@pytest.fixture(scope="session")
def initramfs() -> Callable[[str], Path]:
    """An initramfs that runs a busybox script and powers off."""

    def make(script: str) -> Path:
        return build(f'echo "{UP}"\n{script}\npoweroff -f', kernel_tree())

    return make


@pytest.fixture
def boot(kernel: str, initramfs: Callable[[str], Path]) -> Iterator[Boot]:
    machines: list[Machine] = []

    def run(script: str = "", **options: Any) -> Booted:
        settings: dict[str, Any] = {
            "kernel": kernel,
            "initrds": [str(initramfs(script))],
            "append": "quiet",
            "memory": "256M",
            "timeout": BOOT_TIMEOUT,
        }
        machine = Machine(**{**settings, **options})
        machines.append(machine)
        machine.start()
        booted = Booted(machine, machine.wait())
        if UP in booted.console:
            count_boot()
        return booted

    yield run
    for machine in machines:
        machine.close()

"""The pytest plugin: guests as fixtures, kernels as parameters, a failed test that says why.

Loaded by pytest by itself (entry point ``pytest11``). docs/pytest.md tells how it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator

import pytest

from vmm.arch.base import native_host, native_name
from vmm.errors import VmmError
from vmm.host import NESTED
from vmm.machine import Machine
from vmm.result import RunResult
from vmm.testing import tap
from vmm.testing.report import console_tail, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MARKERS = (
    "kernel(name, ...): the kernels that the guest of this test boots, each in a run of its own",
    "memory(size): the guest's memory",
    "cpus(count): the guest's CPUs",
    "arch(name): the guest's architecture; the test is skipped where that cannot run",
    "net(how): the guest's network card, as --net has it",
    "deadline(seconds): how long the guest of this test may run",
)
_machines = pytest.StashKey[list[Machine]]()

#: Starts a machine with these settings beside those of the markers.
Factory = Callable[..., Machine]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmm", "guests (vmm)")
    group.addoption(
        "--vmm-kernel", action="append", default=[], metavar="KERNEL",
        help="the kernel of guests, as vmm run --kernel has it; given again, tests run with each "
        "(default: the newest of this machine)",
    )  # fmt: skip
    group.addoption(
        "--vmm-accel", choices=("kvm", "nested"), default="kvm",
        help="nested: run all of pytest in one emulated host, where this machine's KVM cannot boot "
        "Linux",
    )  # fmt: skip
    group.addoption(
        "--vmm-timeout", type=float, default=300.0, metavar="SECONDS",
        help="how long a guest may run, unless its test has a deadline (default: 300)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)


# ---- where ---------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """The whole of pytest in an emulated host, once, if that is asked for."""
    if config.getoption("--vmm-accel") != "nested" or os.environ.get(NESTED):
        return None
    if hasattr(config, "workerinput"):
        return None  # one of several processes, which its parent has put where it belongs
    import sys

    from vmm import nested

    written = [config.getoption("--junitxml", default=None), config.getoption("--basetemp")]
    folders = {os.path.dirname(os.path.abspath(path)) for path in written if path}
    argv = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    place = os.getcwd()
    os.chdir(config.invocation_params.dir)
    try:
        return nested.run(argv, nested.Options(rw=sorted(folders)))
    except VmmError as error:
        raise pytest.UsageError(str(error)) from error
    finally:
        os.chdir(place)


# ---- guests --------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vm_kernel" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("kernel")
    kernels = list(marker.args) if marker else metafunc.config.getoption("--vmm-kernel")
    if kernels:
        names = [os.path.basename(os.path.normpath(str(kernel))) for kernel in kernels]
        metafunc.parametrize("vm_kernel", kernels, ids=names, indirect=True)


@pytest.fixture
def vm_kernel(request: pytest.FixtureRequest) -> str | None:
    """The kernel that guests of this test boot; None is the newest of this machine."""
    kernel = getattr(request, "param", None)
    return None if kernel is None else str(kernel)


@pytest.fixture
def vm_factory(request: pytest.FixtureRequest, vm_kernel: str | None) -> Iterator[Factory]:
    """Starts guests: ``vm_factory(memory="2G")``, with any of Machine's keywords. They take
    commands (``vm.run([...])``), see this machine's files, and end with the test."""
    machines = request.node.stash.setdefault(_machines, [])

    def start(**settings: Any) -> Machine:
        chosen = {**_marked(request.node), **settings}
        if "kernel" not in chosen and vm_kernel is not None:
            chosen["kernel"] = vm_kernel
        _can_run()
        machine = Machine(**chosen)
        machines.append(machine)
        machine.start()
        return machine

    yield start
    for machine in reversed(machines):
        machine.close()
    machines.clear()


@pytest.fixture
def vm(vm_factory: Factory) -> Machine:
    """A guest that takes commands: ``vm.run(["uname", "-r"])``. It ends with the test."""
    return vm_factory()


def _marked(node: pytest.Item) -> dict[str, Any]:
    """Machine's keywords, from a test's markers."""
    deadline = node.get_closest_marker("deadline")
    default: Any = node.config.getoption("--vmm-timeout")
    seconds = float(deadline.args[0] if deadline else default)
    found: dict[str, Any] = {"root": "/", "timeout": seconds}
    for name in ("memory", "cpus", "net"):
        marker = node.get_closest_marker(name)
        if marker is not None:
            found[name] = marker.args[0]
    arch = node.get_closest_marker("arch")
    here = native_name() if arch is not None else ""
    if arch is not None and arch.args[0] != here:
        pytest.skip(f"guests of {arch.args[0]} cannot run on {here}")
    return found


def _can_run() -> None:
    """Skips where KVM cannot boot Linux, and says what can be done."""

    if os.environ.get(NESTED):
        return
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("/dev/kvm cannot be used here; --vmm-accel=nested brings one")
    if not native_host().extension():
        pytest.skip("this machine's KVM cannot boot Linux; --vmm-accel=nested brings one that can")


# ---- results -------------------------------------------------------------------------------------


@pytest.fixture
def vm_tap(request: pytest.FixtureRequest) -> Callable[[RunResult | bytes | str], None]:
    """Makes of a command's TAP or kselftest output sub-results of this test: ``vm_tap(result)``.
    Output without a single result fails, as does a command that failed although all it reported
    is well."""

    def report(result: RunResult | bytes | str) -> None:
        output = result.stdout if isinstance(result, RunResult) else result
        text = output if isinstance(output, str) else output.decode(errors="replace")
        results = tap.parse(text)
        if not results:
            pytest.fail("the command printed no TAP", pytrace=False)
        _each(request, results)
        failed = any(item.status == "failed" for item in results)
        if isinstance(result, RunResult) and result.status and not failed:
            pytest.fail(f"all it reported is well, but: {result.message}", pytrace=False)

    return report


def _each(request: pytest.FixtureRequest, results: list[tap.TapResult]) -> None:
    """As sub-tests, where this pytest has them; else the failed ones in one failure."""
    try:
        subtests = request.getfixturevalue("subtests")
    except pytest.FixtureLookupError:
        lines = [_failure(item) for item in results if item.status == "failed"]
        if lines:
            pytest.fail("\n".join(lines), pytrace=False)
        return
    for item in results:
        with subtests.test(msg=item.name):
            if item.status == "failed":
                pytest.fail(_failure(item), pytrace=False)
            elif item.status == "skipped":
                pytest.skip(item.reason or "the guest skipped it")


def _failure(item: tap.TapResult) -> str:
    return "\n".join(filter(None, (f"not ok: {item.name}", item.reason, item.detail)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    outcome = yield
    report: pytest.TestReport = outcome.get_result()
    machines = item.stash.get(_machines, [])
    if report.when == "teardown" or not machines or (report.when == "setup" and report.passed):
        return
    for number, machine in enumerate(machines):
        which = f"guest {number}, " if len(machines) > 1 else ""
        if report.failed:
            _explain(report, which, machine)
        if item.config.getoption("--junitxml", default=None):
            # What JUnit's system-out is made of (junit_logging), once the test is torn down.
            item.add_report_section("call", f"stdout {which}console", console_tail(machine))


def _explain(report: pytest.TestReport, which: str, machine: Machine) -> None:
    from vmm.testing.symbols import load

    kernel = machine.config.kernel
    symbols = load(kernel) if isinstance(kernel, str) else None
    for title, text in describe(machine, symbols):
        add = getattr(report.longrepr, "addsection", None)
        if add is not None:
            add(f"{which}{title}", text)
        else:
            report.sections.append((f"{which}{title}", text))

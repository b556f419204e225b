"""The pytest plugin, in a pytest of its own, with machines that only say what they were asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.testing.symbols import Symbols, load

CONFTEST = '''
import vmm.testing.plugin as plugin
from vmm.result import RunResult

class Fake:
    """A guest whose commands are answered here."""
    def __init__(self, **settings):
        self.settings = settings
        self.result = None
        self.closed = False
        self.config = type("Config", (), {"kernel": settings.get("kernel")})
        text = "[    0.1] booting\\n[    1.0] Oops: 0000 [#1]\\n[    1.1] RIP: ffffffff81000010\\n"
        self.console = type("Console", (), {"text": text})
    def start(self):
        print("started", self.settings)
    def close(self):
        print("closed")
    def run(self, argv, **more):
        return RunResult(0, "exited", stdout=str(self.settings).encode())
    def diagnosis(self):
        return "rip=ffffffff81000010"

plugin.Machine = Fake
plugin._can_run = lambda: None
'''


class Outcome:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status = done.returncode
        self.out = done.stdout + done.stderr

    def has(self, *texts: str) -> None:
        for text in texts:
            assert text in self.out, self.out


def run(folder: Path, test: str, *args: str, conftest: str = CONFTEST) -> Outcome:
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_it.py").write_text("import pytest\n" + test)
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(root)
    plain = ["-p", "no:cacheprovider", "-p", "no:rerunfailures", "-p", "vmm.testing.plugin"]
    argv = [sys.executable, "-m", "pytest", "-rA", "--strict-markers", *plain, *args]
    done = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    return Outcome(done)


def test_markers_are_settings_and_the_guest_ends(tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        """
@pytest.mark.memory("2G")
@pytest.mark.cpus(3)
@pytest.mark.net("user")
@pytest.mark.deadline(7)
def test_a(vm):
    assert vm.settings == {
        "root": "/", "timeout": 7.0, "memory": "2G", "cpus": 3, "net": "user"
    }

def test_b(vm_factory):
    one, two = vm_factory(), vm_factory(memory="1G", kernel="k")
    assert one.settings == {"root": "/", "timeout": 44.0}
    assert two.settings["memory"] == "1G" and two.settings["kernel"] == "k"
""",
        "--vmm-timeout=44",
    )
    assert outcome.status == 0, outcome.out
    assert outcome.out.count("closed") == 3


def test_kernels_are_parameters(tmp_path: Path) -> None:
    outcome = run(
        tmp_path,
        """
def test_a(vm):
    assert vm.settings["kernel"] in ("/k/one", "/k/two")

@pytest.mark.kernel("/k/three")
def test_b(vm):
    assert vm.settings["kernel"] == "/k/three"

def test_c():
    pass
""",
        "--vmm-kernel=/k/one",
        "--vmm-kernel=/k/two",
    )
    outcome.has("test_a[one]", "test_a[two]", "test_b[three]", "4 passed")


def test_another_architecture_is_skipped(tmp_path: Path) -> None:
    outcome = run(tmp_path, "@pytest.mark.arch('vax')\ndef test_a(vm): pass")
    outcome.has("guests of vax cannot run on", "1 skipped")


def test_a_failure_tells_of_the_guest(tmp_path: Path) -> None:
    (tmp_path / "System.map").write_text("ffffffff81000000 T start_here\nffffffff81000100 t b\n")
    (tmp_path / "bzImage").touch()
    outcome = run(
        tmp_path,
        f"""
@pytest.mark.kernel({str(tmp_path / "bzImage")!r})
def test_a(vm):
    assert 1 == 2
""",
        "--junitxml=junit.xml",
        "-o",
        "junit_logging=all",
    )
    assert outcome.status == 1
    outcome.has(
        "the guest's kernel: Oops: 0000 [#1]",
        "RIP: ffffffff81000010 (start_here+0x10)",
        "the guest's vCPUs",
        "rip=ffffffff81000010 (start_here+0x10)",
        "the guest's console, its last 3 lines",
    )
    junit = (tmp_path / "junit.xml").read_text()
    assert "Oops: 0000" in junit.partition("</failure>")[0]
    assert "booting" in junit.partition("<system-out>")[2]


def test_a_passing_test_leaves_its_log_in_junit(tmp_path: Path) -> None:
    run(tmp_path, "def test_a(vm): pass", "--junitxml=junit.xml", "-o", "junit_logging=all")
    assert "booting" in (tmp_path / "junit.xml").read_text()


TAP = """
from vmm.result import RunResult

def test_a(vm_tap):
    vm_tap(RunResult({status}, "exited", message="It ended.", stdout={text!r}.encode()))
"""


def test_tap_becomes_results(tmp_path: Path) -> None:
    text = "1..3\nok 1 - up\n# why not\nnot ok 2 - down\nok 3 - x # SKIP no\n"
    outcome = run(tmp_path, TAP.format(status=1, text=text))
    assert outcome.status == 1
    outcome.has("not ok: down", "why not")


@pytest.mark.parametrize(
    ("status", "text", "says"),
    [
        (0, "ok 1 a\n", "1 passed"),
        (0, "nothing\n", "the command printed no TAP"),
        (3, "ok 1 a\n", "all it reported is well, but: It ended."),
        (0, "1..2\nok 1 a\n", "2 results were promised, 1 came"),
    ],
)
def test_tap_that_is_odd(tmp_path: Path, status: int, text: str, says: str) -> None:
    outcome = run(tmp_path, TAP.format(status=status, text=text))
    outcome.has(says)
    assert outcome.status == (0 if "passed" in says else 1)


def test_where_kvm_cannot_boot_linux_tests_are_skipped(tmp_path: Path) -> None:
    text = "from vmm.arch.base import native_host\nnative_host().extension = lambda: ''\n"
    outcome = run(tmp_path, "def test_a(vm): pass", conftest=text)
    outcome.has("1 skipped", "--vmm-accel=nested")


def test_all_of_it_in_an_emulated_host(tmp_path: Path) -> None:
    text = """
import os
import vmm.nested
def fake(argv, options):
    print("nested:", argv[1:], options.rw)
    return 5
vmm.nested.run = fake
"""
    (tmp_path / "early.py").write_text(text)
    outcome = run(
        tmp_path,
        "def test_a(): pass",
        "-p",
        "early",
        "--vmm-accel=nested",
        f"--junitxml={tmp_path}/out/j.xml",
        conftest="",
    )
    assert outcome.status == 5, outcome.out
    outcome.has("nested: ['-m', 'pytest', '-rA'", "--vmm-accel=nested", f"['{tmp_path}/out']")


def test_symbols() -> None:
    symbols = Symbols([(0xFFFFFFFF81000000, "a"), (0xFFFFFFFF81000100, "b")])
    assert symbols.annotate("at ffffffff81000110 and 0xffffffff81000001, 1234") == (
        "at ffffffff81000110 (b+0x10) and 0xffffffff81000001 (a+0x1), 1234"
    )
    # Named already, below everything, and moved by the kernel.
    assert symbols.annotate("ffffffff81000110 (b+0x10/0x20)") == "ffffffff81000110 (b+0x10/0x20)"
    assert symbols.annotate("ffffffff80000000") == "ffffffff80000000"
    moved = "RIP: ffffffff82000001\nKernel Offset: 0x1000000 from 0xffffffff81000000"
    assert "ffffffff82000001 (a+0x1)" in symbols.annotate(moved)


def test_a_map_without_functions_is_none(tmp_path: Path) -> None:
    (tmp_path / "System.map-6.1").write_text("ffffffffffffffff B The real one is elsewhere\n")
    (tmp_path / "vmlinuz-6.1").touch()
    assert load(str(tmp_path / "vmlinuz-6.1")) is None
    (tmp_path / "System.map-6.1").write_bytes(b"\xff\xfe garbage T x\n")
    assert load(str(tmp_path / "vmlinuz-6.1")) is None

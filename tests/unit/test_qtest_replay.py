"""Recorded sessions: each file in tests/traces is one that once did, or could do, harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.qtest_client import ROOT, Qtest, QtestRig
from vmm.errors import ConfigError
from vmm.qtest.replay import Trace, main, replay

TRACES = sorted((ROOT / "tests/traces").glob("*.trace"))


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "vmm.qtest.replay", *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)


def test_there_are_traces() -> None:
    assert len(TRACES) >= 14


@pytest.mark.parametrize("trace", TRACES, ids=lambda path: path.stem)
def test_a_frozen_session(trace: Path) -> None:
    done = run("--check", trace)
    assert done.returncode == 0, done.stderr


def test_a_log_is_a_trace(tmp_path: Path) -> None:
    """What a client did, done again by its log alone, with the same answers."""
    log = tmp_path / "log"
    with QtestRig("mmio", "-device", "virtio-rng-{bus}", log=str(log)) as rig:
        rig.driver.start()
        q = rig.driver.queues[0]
        q.add([], [4])
        q.add([], [8])
        q.kick()
        rig.settle()
        assert q.used_idx == 2
    trace = Trace(log.read_text().splitlines())
    assert trace.args is not None
    assert trace.args == ["-M", "microvm", "-m", "16", "-device", "virtio-rng-device"]
    assert replay(trace, trace.args, check=True) == ""
    assert replay(trace, [*trace.args, "-device", "virtio-rng-device"], check=True) == ""
    assert main(["--check", str(log)]) == 0


def test_answers_that_differ_are_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Qtest("-M", "none", log=str(log)) as q:
        q.command("writeb 0x1000 7")
        q.load(0x1000, 1)
    other = tmp_path / "other"
    other.write_text(log.read_text().replace("0x0000000000000007", "0x0000000000000008"))
    done = run("--check", other)
    assert done.returncode == 1
    assert "readb 0x1000: OK 0x0000000000000007, not OK 0x0000000000000008" in done.stderr
    assert run(other).returncode == 0


def test_bare_commands(tmp_path: Path) -> None:
    """As reproducers are passed around."""
    file = tmp_path / "file"
    file.write_text("# a comment\n\noutl 0xcf8 0x80001000\n inl 0xcfc\nbogus\n")
    done = run(file)
    assert done.returncode == 2
    assert "does not say what machine it is for" in done.stderr
    done = run(file, "-M", "pc", "-device", "virtio-rng-pci")
    assert (done.returncode, done.stderr) == (0, f"replay: {file}: 3 commands\n")
    file.write_text("# args: -M pc -device virtio-rng-pci,id='a b'\n" + file.read_text())
    assert run(file).returncode == 0


def test_the_machine_may_reset_and_end(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(
        "# args: -M pc -device isa-debug-exit -device virtio-rng-pci\n"
        "outl 0xcf8 0x80001004\noutl 0xcfc 0x7\noutb 0xcf9 6\n"
        "outl 0xcf8 0x80001004\ninw 0xcfc\n[S +0] OK 0x0000\n"
        "outb 0xf4 1\nbogus\n[S +0] never asked\n"
    )
    assert run("--check", file).returncode == 0, run("--check", file).stderr


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("# args: -M 'pc\nreadb 0\n", 2),
        ("# args: -M bogus\nreadb 0\n", 2),
        ('[I +0] ARGS "\n', 2),
        ("# args: -M none\n[S +0] OK\n[R\n[R ]\n\xff\0\n", 0),
        ("# args:\n", 0),
        ("", 2),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, status: int) -> None:
    file = tmp_path / "file"
    file.write_text(text, encoding="latin-1")
    assert main([str(file)]) == status


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "Usage:" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path / "none")]) == 2
    assert "could not be read" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="longer than any command"):
        Trace(["x" * (40 << 20)])

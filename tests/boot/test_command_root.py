"""Commands in a guest that has this machine's files: what it may write, and where that goes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.fetch import busybox
from tests.boot.test_command import ISSUE, ROOT
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from vmm import Machine


class Shares:
    def __init__(self, top: Path) -> None:
        self.top = top
        self.dirs = [top / name for name in ("plain", "ro", "rw", "over")]
        for path in self.dirs:
            path.mkdir()
            (path / "file").write_text(path.name)
        self.plain, self.ro, self.rw, self.over = self.dirs


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> Shares:
    return Shares(tmp_path_factory.mktemp("a,b"))


@pytest.fixture(scope="module")
def vm(kernel: str, shares: Shares) -> Iterator[Machine]:
    with Machine(
        kernel=kernel, root="/", memory="512M", timeout=4 * BOOT_TIMEOUT, hostname="lab",
        rodirs=[f"{shares.ro}:/mnt/ro"], rwdirs=[shares.rw], overlay_dirs=[shares.over],
    ) as made:  # fmt: skip
        made.run(["true"], check=True)
        count_boot()
        yield made


def sh(vm: Machine, script: str) -> tuple[int, str]:
    result = vm.run(["/bin/sh", "-c", script])
    return result.status, result.stdout.decode()


def test_this_machines_programs_under_another_kernel(vm: Machine, kernel: str) -> None:
    code = "import os, sys, platform; print(platform.release(), os.getcwd(), sys.version_info[:2])"
    result = vm.run([sys.executable, "-c", code], check=True)
    release = Path(kernel).name.removeprefix("vmlinuz-")
    assert result.stdout.decode() == f"{release} {os.getcwd()} {sys.version_info[:2]}\n"
    assert sh(vm, "hostname; cat /etc/group") == (0, "lab\n" + Path("/etc/group").read_text())


def test_what_is_written_is_lost(vm: Machine, shares: Shares) -> None:
    path = shares.plain
    script = f"cd {path} && cat file && echo new > file && rm /etc/passwd && cat file"
    assert sh(vm, script) == (0, "plainnew\n")
    assert (path / "file").read_text() == "plain"
    assert Path("/etc/passwd").exists()
    assert sh(vm, "cat /etc/passwd; mkdir /etc/new && ls -d /etc/new") == (0, "/etc/new\n")


def test_other_directories(vm: Machine, shares: Shares) -> None:
    assert sh(vm, "cat /mnt/ro/file; touch /mnt/ro/new") == (1, "ro")
    assert (shares.ro / "file").read_text() == "ro"
    status, said = sh(vm, f"cd {shares.rw} && cat file && echo new > file && mkdir -p d/e")
    assert (status, said) == (0, "rw")
    assert (shares.rw / "file").read_text() == "new\n"
    assert (shares.rw / "d/e").is_dir()
    status, said = sh(vm, f"cd {shares.over} && cat file && echo new > file && cat file && touch x")
    assert (status, said) == (0, "overnew\n")
    assert (shares.over / "file").read_text() == "over"
    assert not (shares.over / "x").exists()


@pytest.mark.timeout(400)
@pytest.mark.skipif(
    os.environ.get("VMM_FULL") != "1", reason="takes minutes if emulated; VMM_FULL=1 runs it"
)
def test_the_projects_own_tests(vm: Machine) -> None:
    tests = ["tests/unit/test_oops.py", "tests/unit/test_aml.py"]
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    result = vm.run(argv, cwd=str(ROOT), timeout=3 * BOOT_TIMEOUT)
    assert result.status == 0, result.stdout.decode() + result.stderr.decode()
    assert b" passed" in result.stdout


def test_a_root_of_ones_own_is_written_through(kernel: str, tmp_path: Path) -> None:
    for name in ("bin", "proc", "sys", "dev", "run", "tmp", "etc"):
        (tmp_path / name).mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "tmp").chmod(0o1777)
    shutil.copy(busybox(), tmp_path / "bin/busybox")
    (tmp_path / "bin/sh").symlink_to("busybox")
    (tmp_path / "etc/passwd").write_text("ann::7:8:a:/home/ann:/bin/ann\n")
    with Machine(kernel=kernel, root=tmp_path, rw=True, memory="256M", timeout=BOOT_TIMEOUT) as vm:
        script = 'busybox id -u; echo $HOME $SHELL "$0"; umask; echo mine > /tmp/f'
        result = vm.run(["sh", "-c", script, "a b"], user="ann", check=True)
        assert result.stdout == b"7\n/home/ann /bin/ann a b\n0022\n"
    count_boot()
    assert (tmp_path / "tmp/f").read_text() == "mine\n"


def test_the_issues_line_with_nothing_said(tmp_path: Path) -> None:
    """The newest kernel of this machine, its files, its own command line."""
    done = subprocess.run(
        [sys.executable, "-m", "vmm", "run", "--accel=kvm", "--", *ISSUE], check=False,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_TIMEOUT, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    count_boot()

"""What the command finds in the nested machine: KVM, files, identity; and its status."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import count_boot
from tests.nested.conftest import DEADLINE, ROOT, command, environment, nested
from vmm.guest.modules import ModuleTree
from vmm.nested.machine import find_parts, needed

pytestmark = pytest.mark.timeout(DEADLINE + 20)

#: KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CREATE_VCPU, by their numbers alone.
KVM = """
import fcntl, os
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xae01, 0)
vcpu = fcntl.ioctl(vm, 0xae41, 0)
print(fcntl.ioctl(kvm, 0xae00, 0), vm > 0, vcpu > 0, "svm" in open("/proc/cpuinfo").read())
"""


def test_a_true_kvm() -> None:
    done = nested("--", sys.executable, "-c", KVM)
    assert (done.status, done.out) == (0, b"12 True True True\n"), done
    count_boot()


def test_where_and_who(tmp_path: Path) -> None:
    """Directory (one below /tmp included), user, arguments, environment, limits and host name."""
    script = 'pwd; id -u; id -G; umask; uname -n; echo "$1|$2|$3|$A|$B|$VMM_NESTED"'
    environ = {**environment(), "A": "from outside"}
    done = subprocess.run(
        ["sh", "-c", 'umask 027; exec "$@"', "sh",
         *command("--env", "B=x=y z", "--", "sh", "-c", script, "sh", "a b", "", "ü\n*")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=tmp_path,
        env=environ,
        timeout=DEADLINE,
        check=False,
    )  # fmt: skip
    groups = " ".join(map(str, dict.fromkeys([os.getgid(), *os.getgroups()])))
    assert done.stdout.decode().split("\n") == [
        str(tmp_path), str(os.getuid()), groups, "0027", socket.gethostname(),
        "a b||ü", "*|from outside|x=y z|1", "",
    ]  # fmt: skip
    assert done.returncode == 0


def test_what_is_written(tmp_path: Path) -> None:
    """Into --rw directories: really; anywhere else: seen inside, gone at the end."""
    shared, other = tmp_path / "shared dir, with, commas", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    (shared / "old").write_text("old")
    (other / "kept").write_text("as it was")
    script = f"""
set -e
cd '{tmp_path}'
echo new > '{shared.name}/new'
mkdir '{shared.name}/dir'
mv '{shared.name}/old' '{shared.name}/dir/moved'
chmod 600 '{shared.name}/new'; ln -s new '{shared.name}/link'
echo lost > other/lost; echo changed > other/kept; rm -f other/nothing
cat other/lost other/kept '{shared.name}/new'
"""
    done = nested("--rw", str(shared), "--", "sh", "-c", script)
    assert (done.status, done.out) == (0, b"lost\nchanged\nnew\n"), done
    assert (shared / "new").read_text() == "new\n"
    assert (shared / "new").stat().st_mode & 0o777 == 0o600
    assert (shared / "dir/moved").read_text() == "old"
    assert (shared / "link").readlink() == Path("new")
    assert sorted(p.name for p in other.iterdir()) == ["kept"]
    assert (other / "kept").read_text() == "as it was"


def test_a_large_file_on_a_writable_share(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5_000_001))
    done = nested("--rw", str(tmp_path), "--", "cp", str(source), str(tmp_path / "copy"))
    assert done.status == 0, done
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["sh", "-c", "kill -TERM $$"], 143, b""),
        (["sh", "-c", "kill -9 $$"], 137, b""),
        (["no-such-command"], 127, b"vmm: no-such-command: command not found\n"),
        (["/etc/passwd"], 126, b"vmm: /etc/passwd: Permission denied\n"),
        (["/etc"], 126, b"vmm: /etc: Permission denied\n"),
    ],
)
def test_statuses_as_a_shell_has_them(argv: list[str], status: int, message: bytes) -> None:
    done = nested("--", *argv)
    assert (done.status, done.err) == (status, message)


def test_memory_and_cpus_as_asked() -> None:
    script = "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo"
    done = nested("--memory", "700M", "--cpus", "1", "--", "sh", "-c", script)
    cpus, memory = map(int, done.out.split())
    assert cpus == 1
    assert 500 < memory < 700


def test_out_of_memory_is_said() -> None:
    eat = "x = []\nwhile True: x.append(bytes([1]) * 10000000)"
    done = nested("--memory", "700M", "--cpus", "1", "--", sys.executable, "-c", eat)
    assert done.status == 137
    assert b"ran out of memory; give it more with --memory" in done.err


def test_verbose_shows_the_log() -> None:
    done = nested("--verbose", "--", "true")
    assert done.status == 0
    assert b"Linux version" in done.err


def test_without_a_home_to_cache_in(tmp_path: Path) -> None:
    """As for a user whose home cannot be written."""
    environ = {
        **environment(),
        "XDG_CACHE_HOME": "/proc/nowhere",
        "VMM_NESTED_KERNEL": _a_kernel(),
    }
    done = subprocess.run(
        command("--", "echo", "up"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=tmp_path,
        env=environ,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"up\n"), done


def _a_kernel() -> str:
    return str(Path(find_parts(None).image).parent.parent)


@pytest.fixture
def for_everybody(tmp_path: Path) -> Iterator[Path]:
    """A directory that any user can read, with the package, /init and a small kernel tree."""
    kernel = find_parts(None)
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    shutil.copytree(ROOT / "vmm", top / "vmm", ignore=shutil.ignore_patterns("*.so", "*.o"))
    (top / "boot").mkdir()
    shutil.copy(kernel.image, top / "boot" / f"vmlinuz-{kernel.version}")
    tree = ModuleTree(kernel.modules_dir)
    target = top / "lib/modules" / kernel.version
    for path in [kernel.modules_dir + "/modules.builtin", *tree.resolve(needed())]:
        to = target / Path(path).relative_to(kernel.modules_dir)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    yield top
    shutil.rmtree(top)


def test_as_another_user(for_everybody: Path) -> None:
    """Who has neither a home nor a right to anything but reading."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user; the other tests ran as one already")
    user = pwd.getpwnam("nobody")
    python = next((p for p in ("/usr/bin/python3", sys.executable) if os.path.exists(p)), "")
    script = "id -u; test -w /dev/kvm && echo kvm; touch /etc/x 2>/dev/null || echo no"
    done = subprocess.run(
        [python, "-m", "vmm", "nested", "--kernel", str(for_everybody), "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(for_everybody), "HOME": "/nonexistent"},
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        timeout=DEADLINE,
        check=False,
    )
    expected = f"{user.pw_uid}\nkvm\nno\n".encode()
    assert (done.returncode, done.stdout) == (0, expected), done


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rw", "/no/such/place"], "--rw /no/such/place: there is no such directory"),
        (["--rw", "/etc/passwd"], "--rw /etc/passwd: there is no such directory"),
        (["--env", "NOT_SET_ANYWHERE"], "it is not set in the environment"),
        (["--memory", "10M"], "at least 256 MiB"),
        (["--cpus", "0"], "0 CPUs"),
    ],
)
def test_what_cannot_be_is_said(args: list[str], message: str) -> None:
    done = nested(*args, "--", "true")
    assert (done.status, done.out) == (2, b"")
    assert message in done.err.decode()


def test_a_kernel_that_is_none(tmp_path: Path) -> None:
    done = nested("--kernel", str(tmp_path), "--", "true")
    assert done.status == 125
    assert f"no kernel with its modules at {tmp_path}" in done.err.decode()

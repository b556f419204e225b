"""The second start comes from a snapshot, and is a machine like the first."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nested.conftest import DEADLINE, Start, command, environment, qemu_children
from tests.support.waiting import wait_for
from vmm.nested.machine import find_parts

pytestmark = pytest.mark.timeout(3 * DEADLINE)


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cache that only these tests use; the first run has filled it."""
    cache = tmp_path_factory.mktemp("cache")
    kernel = str(Path(find_parts(None).image).parent.parent)
    settings = {**environment(), "XDG_CACHE_HOME": str(cache), "VMM_NESTED_KERNEL": kernel}
    assert run("echo up", settings) == "up\n"
    yield settings
    for file in cache.rglob("ram"):
        file.unlink()


def run(script: str, environ: dict[str, str]) -> str:
    done = subprocess.run(
        command("--memory", "1G", "--", "sh", "-c", script),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environ,
        timeout=2 * DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done
    return done.stdout


def the_state(environ: dict[str, str]) -> Path:
    (state,) = Path(environ["XDG_CACHE_HOME"]).rglob("snapshots/*/state")
    return state


def test_it_is_used_and_left_as_it_was(environ: dict[str, str], start: Start) -> None:
    state = the_state(environ)
    before = [(f.stat().st_mtime_ns, f.stat().st_blocks) for f in sorted(state.parent.iterdir())]
    process = start("--memory", "1G", "--", "sh", "-c", "echo up; cat", env=environ)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    (qemu,) = qemu_children(process.pid)
    assert b"-incoming" in Path(f"/proc/{qemu}/cmdline").read_bytes().split(b"\0")
    process.stdin.write(bytes(1000000))
    process.stdin.close()
    assert process.stdout.read() == bytes(1000000)
    assert process.wait(DEADLINE) == 0
    after = [(f.stat().st_mtime_ns, f.stat().st_blocks) for f in sorted(state.parent.iterdir())]
    assert after == before


def test_clock_and_random_numbers_are_of_this_run(environ: dict[str, str]) -> None:
    script = "date +%s; od -An -tx1 -N16 /dev/urandom; cat /proc/sys/kernel/random/boot_id"
    begin = time.time()
    first, second = (run(script, environ).split("\n") for _ in range(2))
    assert int(begin) <= int(first[0]) <= int(second[0]) <= time.time() + 1
    assert first[1] != second[1]
    assert first[2] != second[2]


def test_a_damaged_one_is_replaced(environ: dict[str, str]) -> None:
    state = the_state(environ)
    good = state.stat().st_size
    state.write_bytes(state.read_bytes()[: good // 2])
    assert run("echo up", environ) == "up\n"
    assert not state.exists()
    assert run("echo up", environ) == "up\n"
    assert the_state(environ).stat().st_size > good // 2


def test_an_interrupted_one_leaves_nothing(environ: dict[str, str], start: Start) -> None:
    process = start("--memory", "900M", "--", "true", env=environ)
    wait_for(lambda: qemu_children(process.pid), DEADLINE)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(20) == 143
    assert not list(Path(environ["XDG_CACHE_HOME"]).rglob("snapshots/.draft*"))


def test_not_when_it_is_not_wanted(environ: dict[str, str], start: Start) -> None:
    without = {**environ, "VMM_NESTED_SNAPSHOT": "0"}
    process = start("--memory", "1G", "--", "echo", "up", env=without)
    wait_for(lambda: qemu_children(process.pid), DEADLINE)
    (qemu,) = qemu_children(process.pid)
    assert b"-incoming" not in Path(f"/proc/{qemu}/cmdline").read_bytes()
    assert process.wait(DEADLINE) == 0

"""Which I/O threads serve a disk's queues, and where they run."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.blk_requests import SECTORS, Disk, pattern, read
from tests.virtio_rig import TRANSPORTS, Rig
from vmm._native import ffi, lib
from vmm.devices.virtio.device import Placement
from vmm.devices.virtio.rng import Rng
from vmm.errors import HostError
from vmm.values import cpu_list


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(0, SECTORS))
    return path


def io_threads() -> dict[str, str]:
    """The CPUs that each I/O thread of this process may run on, by its id."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        status = dict(
            line.split(":\t", 1)
            for line in (task / "status").read_text().splitlines()
            if "\t" in line
        )
        if status["Name"] == "vmm-io":
            found[task.name] = status["Cpus_allowed_list"]
    return found


def test_threads_take_turns_on_the_cpus_given() -> None:
    cpus = sorted(os.sched_getaffinity(0))[:2]
    before = io_threads()
    threads = Placement("queue", cpus).threads("disk0", 3)
    for thread in threads:
        lib.vmm_loop_barrier(thread.native)  # it has given itself a name
    new = sorted(cpu for task, cpu in io_threads().items() if task not in before)
    assert new == sorted(str(cpus[i % len(cpus)]) for i in range(3))
    for thread in threads:
        thread.close()


@pytest.mark.parametrize(("mode", "count"), [("shared", 0), ("device", 1), ("queue", 3)])
def test_how_many_threads(mode: str, count: int) -> None:
    threads = Placement(mode).threads("disk0", 3)
    assert len(threads) == count
    for thread in threads:
        thread.close()


def test_a_cpu_that_is_not_there() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for cpu in (1023, 65535):
        with pytest.raises(HostError, match=f"could not be pinned to CPU {cpu}: Invalid"):
            Placement("device", [cpu]).threads("disk0", 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shared_thread_is_pinned_too() -> None:
    loop = lib.vmm_loop_create()
    assert loop != ffi.NULL
    cpu = min(os.sched_getaffinity(0))
    lib.vmm_loop_barrier(loop)
    before = io_threads()
    Placement("shared", [cpu]).pin(loop)
    assert sum(cpus == str(cpu) for cpus in io_threads().values()) >= 1
    assert set(io_threads()) == set(before)
    lib.vmm_loop_destroy(loop)


def test_a_thread_that_looks_before_it_sleeps(image: Path) -> None:
    """It serves, it stops, and it is there for other sources too."""
    rig = Disk(image, "mmio", queues=2)
    lib.vmm_loop_poll(rig.blk._threads[0].native, 2000)
    rig.driver.start()
    for turn in range(50):
        for q in rig.driver.queues.values():
            assert read(q, turn) == pattern(turn)
    rig.driver.reset()
    rig.close()


@pytest.mark.parametrize(
    ("text", "cpus"), [("", []), ("3", [3]), ("2-4,0", [2, 3, 4, 0]), ("1,1", [1, 1])]
)
def test_lists_of_cpus(text: str, cpus: list[int]) -> None:
    assert cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-2", "1,,2", "0-99999999", "70000"])
def test_not_lists_of_cpus(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        cpu_list(text)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_borrowed_loop_works_when_it_is_told_to(transport: str) -> None:
    rig = Rig(Rng(), transport)
    try:
        lib.vmm_loop_borrow(rig.loop)
        rig.driver.start()
        queue = rig.driver.queues[0]
        for n in (1, 2, 3):
            queue.add([], [n])
        queue.kick()
        assert queue.take() is None
        lib.vmm_loop_step(rig.loop, 5000)
        assert [queue.wait(0)[1] for _ in range(3)] == [1, 2, 3]

        other = threading.Thread(target=lib.vmm_loop_barrier, args=(rig.loop,))
        other.start()
        lib.vmm_loop_step(rig.loop, 5000)
        other.join(5)
        assert not other.is_alive(), "a call of another thread is done in a step, too"

        queue.add([], [4])
        queue.kick()
        lib.vmm_loop_return(rig.loop)
        assert queue.wait()[1] == 4
        lib.vmm_loop_borrow(rig.loop)
        rig.driver.reset()
        lib.vmm_loop_return(rig.loop)
    finally:
        rig.close()

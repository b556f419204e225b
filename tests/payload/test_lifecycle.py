"""Machines in one process: started, watched, held, stopped and dropped, with nothing left over."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest

from tests.support.waiting import tasks, wait_for
from vmm import ConfigError, Machine, VmmError

#: jmp $: runs until it is stopped.
SPIN = bytes.fromhex("ebfe")
#: inc word [0x500]; jmp $-4: counts in memory.
COUNT = bytes.fromhex("ff060005 ebfa")
#: mov al, 7; out 0xf4, al; hlt
EXIT = bytes.fromhex("b007 e6f4 f4")
#: in al, 0x60 for ever: every turn is answered by Python.
COLD = bytes.fromhex("e460 ebfc")


@pytest.fixture
def payload(tmp_path: Path, kvm: str):  # type: ignore[no-untyped-def]
    def make(code: bytes, **options: object) -> Machine:
        path = tmp_path / f"payload-{len(os.listdir(tmp_path))}"
        path.write_bytes(code)
        settings = {"boot": "flat", "memory": "2M", "timeout": 30, "testdev": True}
        return Machine(kernel=path, **{**settings, **options})

    return make


def open_fds() -> set[str]:
    return {f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}" for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")}  # fmt: skip


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def settle() -> None:
    for _ in range(3):
        gc.collect()


def test_five_hundred_in_one_process_leave_nothing(payload) -> None:  # type: ignore[no-untyped-def]
    """Start, run, stop, drop: as often as not by the guest, as often by stop()."""
    for _ in range(5):
        payload(EXIT).run()
    settle()
    fds, threads, maps = len(open_fds()), threading.active_count(), mappings()
    known = tasks()
    names = open_fds()
    for turn in range(500):
        machine = payload(EXIT if turn % 2 else SPIN)
        with machine:
            if turn % 2:
                assert machine.wait().status == 15
            else:
                machine.stop()
                assert machine.wait().reason == "stopped"
        del machine
        if turn % 100 == 99:
            settle()
    settle()
    assert len(open_fds()) == fds, open_fds() - names
    assert threading.active_count() == threads
    wait_for(lambda: tasks() == known)
    # Thread stacks and arenas may be kept by the C library; RAM and rings may not.
    assert mappings() <= maps + 20


def test_status_of_the_debug_exit_port(payload) -> None:  # type: ignore[no-untyped-def]
    result = payload(EXIT).run()
    assert (result.reason, result.status) == ("debug-exit", 15)


def test_pause_holds_and_resume_goes_on(payload) -> None:  # type: ignore[no-untyped-def]
    with payload(COUNT) as vm:
        deadline = time.monotonic() + 20
        while vm.memory.read_int(0x500, 2) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        vm.pause()
        held = vm.memory.read_int(0x500, 2)
        assert held > 0
        time.sleep(0.2)
        assert vm.memory.read_int(0x500, 2) == held
        assert 0x7C00 <= vm.vcpus[0].regs.rip < 0x7C00 + len(COUNT)
        vm.vcpus[0].regs.rax = 0x1234
        assert vm.vcpus[0].regs.rax == 0x1234
        vm.resume()
        while vm.memory.read_int(0x500, 2) == held and time.monotonic() < deadline:
            time.sleep(0.01)
        assert vm.memory.read_int(0x500, 2) != held


def test_pause_while_python_answers(payload) -> None:  # type: ignore[no-untyped-def]
    """A vCPU that is mostly in a Python device still parks, with its I/O done."""
    with payload(COLD) as vm:
        for _ in range(50):
            vm.pause()
            assert 0x7C00 <= vm.vcpus[0].regs.rip <= 0x7C02
            vm.resume()


def test_pauses_nest(payload) -> None:  # type: ignore[no-untyped-def]
    with payload(COUNT) as vm:
        vm.pause()
        vm.pause()
        vm.resume()
        held = vm.memory.read_int(0x500, 2)
        time.sleep(0.1)
        assert vm.memory.read_int(0x500, 2) == held
        vm.resume()


def test_stop_from_any_thread_while_paused(payload) -> None:  # type: ignore[no-untyped-def]
    with payload(SPIN) as vm:
        vm.pause()
        threading.Timer(0.1, vm.stop).start()
        assert vm.wait().reason == "stopped"


def test_timeout_says_where_the_guest_is(payload) -> None:  # type: ignore[no-untyped-def]
    result = payload(SPIN, timeout=0.5).run()
    assert (result.reason, result.status) == ("timeout", 124)
    assert "7c00" in result.diagnosis.lower()
    pytest.importorskip("capstone", exc_type=ImportError)
    assert "jmp" in result.diagnosis


def test_an_exception_in_a_handler_is_raised_by_wait(payload) -> None:  # type: ignore[no-untyped-def]
    vm = payload(COLD)
    vm.start()
    try:
        vm._board.pio.read = lambda addr, size: 1 // 0
        with pytest.raises(ZeroDivisionError):
            vm.wait()
    finally:
        vm.close()


def test_many_at_once(payload) -> None:  # type: ignore[no-untyped-def]
    machines = [payload(SPIN) for _ in range(8)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.stop()
    assert {machine.wait().reason for machine in machines} == {"stopped"}
    for machine in machines:
        machine.close()


def test_a_machine_starts_once_and_closes_twice(payload) -> None:  # type: ignore[no-untyped-def]
    machine = payload(EXIT)
    machine.run()
    machine.close()
    with pytest.raises(VmmError):
        machine.start()


def test_more_vcpus_than_the_host_allows(payload) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError):
        payload(EXIT, cpus=100_000)


def test_a_machine_that_never_started_leaves_nothing(payload) -> None:  # type: ignore[no-untyped-def]
    settle()
    before = len(open_fds())
    machine = payload(EXIT)
    machine.close()
    del machine
    settle()
    assert len(open_fds()) == before

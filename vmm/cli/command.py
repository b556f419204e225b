"""``vmm run -- COMMAND``: a command in a guest, on this process's streams."""

from __future__ import annotations

import os
import sys

from vmm.cli import complain
from vmm.cli.report import exits, explain
from vmm.guest.agent import GuestEnded, command_result
from vmm.guest.command import Command
from vmm.guest.signals import Signals
from vmm.guest.standard import (
    choose_stdio,
    fill_closed_streams,
    open_outputs,
    read_environment,
)
from vmm.guest.streams import Input
from vmm.guest.terminal import Terminal
from vmm.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.config import MachineConfig

_SHELLS = ("/bin/bash", "/bin/sh")
#: What the kernel says when it kills a process for want of memory.
_OUT_OF_MEMORY = "Out of memory: Killed process"
_KILLED = 137


def flags(run: dict[str, Any]) -> list[str]:
    """The flags about the command that are no settings of the machine, for another vmm, whose
    environment is not this one. Raises ConfigError."""
    words = [f"--env={key}={value}" for key, value in read_environment(run["env"]).items()]
    words += [f"--{name}={run[name]}" for name in ("pwd", "user") if run[name] is not None]
    return words


def main(config: MachineConfig, run: dict[str, Any], argv: list[str]) -> int:
    """Gives the exit status: the command's own, or see docs/command.md."""
    fill_closed_streams()
    terminal = Terminal()
    stdio = choose_stdio(terminal)
    command = Command(
        argv or [_shell(config)],
        env=read_environment(run["env"]),
        cwd=run["pwd"],
        user=run["user"],
        place=_here(),
    )
    machine = Machine(config)
    machine.terminal_port = "tty" in stdio
    stdin = Input(0) if stdio[0] != "null" else None
    outputs = open_outputs(terminal, stdio)
    with Signals() as signals:
        try:
            machine.start()
            if run["verbose"] or (os.isatty(2) and not run["quiet"]):
                complain("\n".join(note for device in machine.devices for note in device.notes()))
            status, _ = machine.agent.carry(
                command, terminal, stdio, stdin, outputs, signals=signals
            )
            terminal.restore()
            machine.stop()
            _report(machine, status, verbose=bool(run["verbose"]))
            return status
        except GuestEnded as end:
            terminal.restore()
            return _explain(machine, end)
        finally:
            terminal.restore()
            for output in outputs.values():
                output.close()
            machine.close()


def _report(machine: Machine, status: int, *, verbose: bool) -> None:
    """What there is to say of a command that has ended: as a rule nothing."""
    result = machine.wait()
    if status == _KILLED and _OUT_OF_MEMORY in result.console:
        complain("the guest ran out of memory; give it more with --memory")
    if machine.config.debug_exits:
        print(exits(machine.exit_counts()), file=sys.stderr)
    if verbose:
        times = ", ".join(f"{name} {value:.3f}" for name, value in result.clocks.items())
        complain(f"The guest ran for {result.duration_s:.3f} s ({times}). Its kernel's log:")
        print(result.console, end="", file=sys.stderr)


def _explain(machine: Machine, end: GuestEnded) -> int:
    result = command_result(end.result)
    complain(result.message)
    explain(machine, result, on_screen=False)
    return result.status


def _shell(config: MachineConfig) -> str:
    """What runs when nothing is said."""
    for path in _SHELLS:
        if config.root is not None and os.path.exists(config.root + path):
            return path
    return _SHELLS[-1]


def _here() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None

"""This process's own standard streams and environment, for a command in a guest."""

from __future__ import annotations

import os
import stat

from vmm.errors import ConfigError
from vmm.guest.streams import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.guest.terminal import Terminal


def read_environment(settings: list[str]) -> dict[str, str]:
    """What ``--env`` adds: each of ``KEY=VALUE``, or ``KEY`` with the value it has here."""
    environment: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key:
            raise ConfigError(f"--env {setting}: give KEY or KEY=VALUE")
        if equals:
            environment[key] = value
        elif key in os.environ:
            environment[key] = os.environ[key]
        else:
            raise ConfigError(f"--env {key}: it is not set in the environment")
    return environment


def fill_closed_streams() -> None:
    """A closed standard stream must not become some descriptor of ours by accident."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open("/dev/null", os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)


def choose_stdio(terminal: Terminal) -> list[str]:
    """How each stream travels; see the plan's verb ``stdio``."""
    how = ["tty" if terminal.is_tty[fd] else "port" for fd in range(3)]
    if how[0] == "port" and (os.isatty(0) or _is_null(0)):
        how[0] = "null"  # a background job's terminal is not to be read
    if how[1] == how[2] == "port" and _same_file(1, 2):
        how[2] = "stdout"  # 2>&1: keep the order in which the command wrote
    return how


def _is_null(fd: int) -> bool:
    info = os.fstat(fd)
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3)


def _same_file(one: int, other: int) -> bool:
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def open_outputs(terminal: Terminal, stdio: list[str]) -> dict[str, Output]:
    outputs = {}
    if stdio[1] == "port":
        outputs["out"] = Output("out", 1)
    if stdio[2] == "port":
        outputs["err"] = Output("err", 2)
    if "tty" in stdio:
        outputs["tty"] = Output("tty", terminal.fd)
    return outputs

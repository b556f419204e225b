"""The ``vmm`` command: finds the sub-command and turns errors into sentences and statuses.

Only the sub-command that was asked for is imported.
"""

from __future__ import annotations

import sys

from vmm.errors import STATUS_USAGE, ConfigError, VmmError

#: Sub-commands, and what --help says of them in one line.
COMMANDS = {
    "run": "boot a kernel or a payload in a virtual machine",
    "nested": "run a command in an appliance that has a true /dev/kvm",
    "doctor": "look at this machine, and say what to do so that vmm works on it",
    "qtest": "speak to a machine's devices without KVM, as QEMU's qtest clients do",
    "help": "explain a sub-command",
}

#: An exception nobody foresaw: sysexits' EX_SOFTWARE.
STATUS_BUG = 70
STATUS_SIGINT = 130
STATUS_SIGPIPE = 141


def main(argv: list[str]) -> int:
    """Run one command line (without the program's name); gives the exit status."""
    try:
        status = _dispatch(argv)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
        return status
    except VmmError as e:
        complain(str(e))
        return e.status
    except KeyboardInterrupt:
        complain("interrupted")
        return STATUS_SIGINT
    except BrokenPipeError:
        _forget_stdout()
        return STATUS_SIGPIPE
    except Exception:
        import traceback

        traceback.print_exc()
        complain("this is a fault of vmm itself; please report it with the lines above")
        return STATUS_BUG


def complain(message: str) -> None:
    """Each line of ``message`` on stderr, said by vmm. A closed stderr is no error."""
    try:
        for line in message.splitlines():
            print(f"vmm: {line}", file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _dispatch(argv: list[str]) -> int:
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if command == "run":
        from vmm.cli.run import main as run

        return run(arguments)
    if command == "nested":
        from vmm.cli.nested import main as nested

        return nested(arguments)
    if command == "doctor":
        from vmm.cli.doctor import main as doctor

        return doctor(arguments)
    if command == "qtest":
        from vmm.cli.qtest import main as qtest

        return qtest(arguments)
    return _other(command, arguments)


def _other(command: str, arguments: list[str]) -> int:
    if command in ("--version", "-V"):
        from vmm import __version__

        print(f"vmm {__version__}")
        return 0
    if command in ("", "help", "-h", "--help"):
        from vmm.cli import help as text

        if not command:
            sys.stderr.write(text.overview())
            return STATUS_USAGE
        print(text.of(arguments[0]) if arguments else text.overview(), end="")
        return 0
    from vmm.settings import nearest

    raise ConfigError(
        f"'{command}' is not a command of vmm.{nearest(command, COMMANDS)} See 'vmm --help'."
    )


def _forget_stdout() -> None:
    """Whoever read stdout is gone: keep the interpreter from complaining at exit."""
    import os

    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)

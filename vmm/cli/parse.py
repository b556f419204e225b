"""The command line, read by the settings table with GNU's conventions.

``--flag value``, ``--flag=value``, ``-k value``, ``-kvalue``, joined switches (``-vq``), and
``--`` to end the flags. A long flag is never abbreviated. As QEMU's users write them, long flags
with one dash are understood too (``-kernel``, ``-append``). argparse is not used: its import
takes longer than everything here.
"""

from __future__ import annotations

from vmm.errors import ConfigError
from vmm.settings import OPTIONAL, SWITCH, Setting, device_setting, nearest, of_command


class Parsed:
    """``values`` by dest, only what was given; ``rest``: what follows the flags."""

    __slots__ = ("rest", "values")

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        self.rest: list[str] = []


def flags_of(command: str) -> dict[str, tuple[Setting, bool]]:
    """Every spelling a sub-command understands: its row, and what a switch by it means."""
    known: dict[str, tuple[Setting, bool]] = {}
    for row in of_command(command):
        for flag in (*row.flags, *row.aliases):
            known[flag] = (row, True)
        if row.kind == SWITCH and row.machine:
            known["--no-" + row.name[2:]] = (row, False)
    return known


def parse(argv: list[str], command: str, *, takes_rest: str = "") -> Parsed:
    """Read the arguments of one sub-command. Raises ConfigError.

    With ``takes_rest`` "--" that word begins ``rest``; with "any" the first argument that is no
    flag does, too. Else such an argument is an error.
    """
    known = flags_of(command)
    parsed = Parsed()
    queue = list(reversed(argv))
    while queue:
        arg = queue.pop()
        if arg == "--" or not arg.startswith("-") or arg == "-":
            if not takes_rest or (takes_rest == "--" and arg != "--"):
                _no_arguments(command, arg)
            parsed.rest = ([] if arg == "--" else [arg]) + queue[::-1]
            return parsed
        flag, equals, value = arg.partition("=")
        if flag not in known and "-" + flag in known and len(flag) > 2:
            flag = "-" + flag
        if flag not in known and "--device" in known and len(flag) > 2:
            row = device_setting(flag.lstrip("-"))
            if row is not None:
                known[flag] = (row, True)
        if flag in known:
            _take(parsed, known[flag], flag, value if equals else None, queue)
        elif not arg.startswith("--") and arg[:2] in known:
            _take_short(parsed, known, arg, queue)
        else:
            hint = nearest(flag, [name for name in known if name.startswith("--")])
            raise ConfigError(
                f"{flag} is not a flag of 'vmm {command}'.{hint} See 'vmm {command} --help'."
            )
    return parsed


def _take(
    parsed: Parsed, hit: tuple[Setting, bool], flag: str, value: str | None, queue: list[str]
) -> None:
    row, meaning = hit
    if row.kind == SWITCH:
        if value is not None:
            raise ConfigError(f"{flag} is a switch and takes no value.")
        parsed.values[row.dest] = meaning
        return
    if row.kind == OPTIONAL:
        value = "".join(row.choices[:1]) if value is None else value
    elif value is None:
        if not queue:
            raise ConfigError(f"{flag} needs a value: {flag} {row.metavar}.")
        value = queue.pop()
    read = row.read(value, flag)
    if row.repeatable:
        given = parsed.values.setdefault(row.dest, [])
        assert isinstance(given, list)
        given.append(read)
    else:
        parsed.values[row.dest] = read


def _take_short(
    parsed: Parsed, known: dict[str, tuple[Setting, bool]], arg: str, queue: list[str]
) -> None:
    """``-m1G``, or switches in one word."""
    letters = arg[1:]
    while letters:
        flag, letters = "-" + letters[0], letters[1:]
        if flag not in known:
            raise ConfigError(f"{arg}: {flag} is not a flag.")
        switch = known[flag][0].kind == SWITCH
        _take(parsed, known[flag], flag, None if switch or not letters else letters, queue)
        if not switch:
            return


def _no_arguments(command: str, arg: str) -> None:
    if arg == "--":
        raise ConfigError(f"'vmm {command}' takes flags only; nothing may follow --.")
    hint = f" Did you mean --kernel {arg}?" if command in ("run", "doctor") else ""
    if command == "run":
        hint += " A command for the guest follows --."
    raise ConfigError(f"'vmm {command}' takes flags only, not '{arg}'.{hint}")

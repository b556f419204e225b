"""How a device's options are written: ``--net user,mac=52:54:00:12:34:56,forward=2222:22``.

One grammar for every device: an optional first word, then ``key=value`` or, for a switch, ``key``
alone, between commas; a comma inside a value is written twice, as QEMU has it. A device declares
its keys as Fields; this reads, checks and prints them.
"""

from __future__ import annotations

import os

from vmm.errors import ConfigError
from vmm.values import parse_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

#: A longer summary of all options is none.
USAGE_MAX = 80

ON = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class Field:
    """One key of a device's option.

    ``parse`` takes the text and returns the value or raises ValueError with the rest of a
    sentence; None makes it a switch (``key``, ``key=on``, ``key=off``). ``first``: the value may
    stand first without its key. ``path``: a relative value depends on the directory.
    """

    __slots__ = (
        "choices", "default", "first", "help", "metavar", "name", "parse", "path", "repeatable",
        "required",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        help: str,
        parse: Callable[[str], Any] | None = parse_text,
        *,
        metavar: str = "",
        default: Any = None,
        choices: tuple[str, ...] = (),
        first: bool = False,
        path: bool = False,
        repeatable: bool = False,
        required: bool = False,
    ) -> None:
        self.name = name
        self.help = help
        self.parse = parse
        self.metavar = metavar or name.upper()
        self.default = default
        self.choices = choices
        self.first = first
        self.path = path
        self.repeatable = repeatable
        self.required = required

    @property
    def needed(self) -> bool:
        """Whether a user has to say something: not for a word with a default among a few."""
        return self.required or (self.first and not (self.choices and self.default))

    def read(self, text: str | None) -> Any:
        """The value; raises ValueError."""
        if self.parse is None:
            value = True if text is None else ON.get(text)
            if value is None:
                raise ValueError("must be on or off")
            return value
        if text is None:
            raise ValueError(f"needs a value: {self.name}={self.metavar}")
        if self.choices and text not in self.choices:
            raise ValueError(f"must be one of {', '.join(self.choices)}")
        return self.parse(text)


class Options:
    """A device's options, read. Each Field's value is an attribute; ``str()`` is the text that
    reads back as the same."""

    def __init__(self, values: dict[str, Any], text: str) -> None:
        self.__dict__.update(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def split(text: str) -> list[str]:
    """The parts between commas, doubled commas made one."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def join(parts: Sequence[str]) -> str:
    """What ``split`` takes apart."""
    return ",".join(part.replace(",", ",,") for part in parts)


def read(kind: str, fields: Sequence[Field], text: str, base: str | None = None) -> Options:
    """The options of one device; ``kind`` is its name, for messages; relative paths start at
    ``base``, default the current directory. Raises ConfigError."""
    known = {field.name: field for field in fields}
    first = next((field for field in fields if field.first), None)
    values: dict[str, Any] = {f.name: [] if f.repeatable else f.default for f in fields}
    kept: dict[str, list[str]] = {}
    if "\0" in text:
        raise ConfigError(f"--{kind}: an option cannot hold a NUL byte.")
    for nr, part in enumerate(split(text) if text else ()):
        key, equals, value = part.partition("=")
        field = known.get(key)
        if nr == 0 and first is not None and (field is None or not (equals or not field.parse)):
            field, equals, value = first, "=", part
        if field is None:
            raise ConfigError(f"--{kind} {text}: {_unknown(kind, key, known)}")
        if field.name in kept and not field.repeatable:
            raise ConfigError(f"--{kind} {text}: {field.name} is given twice.")
        try:
            if field.path and equals:
                value = os.path.abspath(os.path.join(base or "", value)) if value else value
            got = field.read(value if equals else None)
        except ValueError as e:
            raise ConfigError(f"--{kind} {text}: {field.name} {e}.") from None
        if field.repeatable:
            values[field.name].append(got)
        else:
            values[field.name] = got
        kept.setdefault(field.name, []).append(f"{field.name}={value}" if equals else field.name)
    missing = [f"{f.name}={f.metavar}" for f in fields if f.required and f.name not in kept]
    if missing:
        raise ConfigError(f"--{kind} {text}: {missing[0]} is missing.")
    return Options(values, join([part for parts in kept.values() for part in parts]))


def _unknown(kind: str, key: str, known: dict[str, Field]) -> str:
    names = ", ".join(known) or "none"
    return f"'{key}' is not an option of {kind}; those are: {names}."


def usage(fields: Sequence[Field]) -> str:
    """``KIND[,mac=MAC][,ro]``, as help prints it; ``KIND[,OPTION...]`` when there are many."""
    parts = []
    for field in fields:
        word = field.name if field.parse is None else f"{field.name}={field.metavar}"
        if field.first:
            word = "|".join(field.choices) or field.metavar
        needed = field.required or (field.first and field is fields[0] and field.needed)
        dots = "..." if field.repeatable else ""
        parts.append((word if needed else f"[,{word}]") + dots)
    text = parts[0] if parts else ""
    for part in parts[1:]:
        text += part if part.startswith("[") else "," + part
    if len(text) > USAGE_MAX:
        text = f"{parts[0]}[,OPTION...]"
    return text.removeprefix("[,").removesuffix("]") if text.startswith("[,") else text

"""Values as users write them: sizes, durations, console targets.

Each parser takes the text of one value and returns it typed, or raises ValueError with the rest
of a sentence that begins with the flag and the text ("--memory 12Q: ...").
"""

from __future__ import annotations

import os

MIB = 1 << 20
UNITS = {"B": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

#: What a console target may be besides the path of a file. ``buffer`` keeps the output in memory.
TARGETS = ("none", "stdio", "pty", "buffer")

#: No digit string this long means anything, and int() of a huge one takes long.
_DIGITS_MAX = 30


def _decimal(text: str) -> tuple[int, int] | None:
    """A plain decimal number as (digits, scale): its value is digits / scale, a power of 10."""
    whole, dot, fraction = text.partition(".")
    digits = whole + fraction
    if not (whole and digits.isascii() and digits.isdigit()) or (dot and not fraction):
        return None
    return (int(digits), int(10 ** len(fraction))) if len(digits) <= _DIGITS_MAX else None


def parse_size(text: str) -> int:
    """Bytes: ``512`` (MiB), ``512M``, ``2G``, ``1.5GiB``, ``4096B``. Powers of 1024."""
    body, unit = text.strip().upper(), MIB
    if body.endswith("B"):
        body, unit = body[:-1], 1
        if body.endswith("I"):
            body, unit = body[:-1], 0
    if body[-1:] and body[-1] in "KMGT":
        body, unit = body[:-1], UNITS[body[-1]]
    number = _decimal(body.strip())
    if number is None or not unit or (number[0] * unit) % number[1]:
        raise ValueError("not a size; write 512M, 2G or a plain number of MiB")
    return number[0] * unit // number[1]


def format_size(size: int) -> str:
    """The shortest text that parse_size reads back as ``size``."""
    for letter in "TGMK":
        if size and size % UNITS[letter] == 0:
            return f"{size // UNITS[letter]}{letter}"
    return f"{size}B"


def parse_duration(text: str) -> float:
    """Seconds: ``90``, ``1.5``, ``90s``, ``5m``, ``1h``, ``250ms``."""
    body = text.strip()
    factor = 1.0
    for suffix, seconds in SECONDS.items():
        if body.endswith(suffix) and body[: -len(suffix)][-1:].isdigit():
            body, factor = body[: -len(suffix)], seconds
            break
    number = _decimal(body)
    if number is None:
        raise ValueError("not a duration; write seconds, or 90s, 5m, 1h")
    return number[0] / number[1] * factor


def format_duration(seconds: float) -> str:
    """The text of a duration; parse_duration reads it back, to the nanosecond."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".")


def parse_count(text: str) -> int:
    """A whole number, 0 or more."""
    number = _decimal(text.strip())
    if number is None or number[1] != 1:
        raise ValueError("not a whole number")
    return number[0]


def parse_cpus(text: str) -> int:
    """A number of vCPUs; says what ``-p`` means here to those who know it from kvmtool."""
    try:
        return parse_count(text)
    except ValueError:
        hint = "; kernel parameters go to --append" if "=" in text or " " in text else ""
        raise ValueError(f"not a number of vCPUs{hint}") from None


def cpu_list(text: str) -> list[int]:
    """Numbers of CPUs, in the order given: ``2-3,6``; '' is none."""
    cpus: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        low, high = parse_count(first), parse_count(last if dash else first)
        if not low <= high < 65536:
            raise ValueError("not a list of CPUs, as 2-3,6 is")
        cpus += range(low, high + 1)
    return cpus


def parse_cpu_list(text: str) -> str:
    cpu_list(text)
    return text


def parse_text(text: str) -> str:
    return text


def parse_path(text: str) -> str:
    if not text:
        raise ValueError("an empty path")
    if "\0" in text:
        raise ValueError("a path cannot hold a NUL byte")
    return text


def parse_target(text: str) -> str:
    """A console's other end: one of TARGETS, or the path of a file to write to. A file that is
    called like a target is written ``./none``, and ``file:PATH`` is understood."""
    if text in ("mon:stdio", "-"):
        return "stdio"
    return text if text in TARGETS else parse_path(text.removeprefix("file:"))


def parse_cpu(text: str) -> str:
    """``host``, then features to add and take away: ``host,-x2apic,+pcid``."""
    model, *features = text.split(",")
    if model != "host":
        raise ValueError("the only CPU model is 'host', as in host,-x2apic,+pcid")
    for feature in features:
        if len(feature) < 2 or feature[0] not in "+-":
            raise ValueError(f"'{feature}' must be a feature with + or - before it")
    return text


def absolute(value: object, base: str | None = None) -> object:
    """The same path, disk or console target with its path made absolute, below ``base``."""
    if value in TARGETS:
        return value
    if hasattr(value, "moved"):
        return value.moved(str(absolute(value.path, base)))  # type: ignore[attr-defined]
    path = str(value)
    return os.path.abspath(os.path.join(base, path) if base else path)

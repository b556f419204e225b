"""The plan that a guest's /init carries out: written here, read by guests/init/init.c.

A plan is a sequence of records: a verb, a decimal count, and that many arguments, each ended by
a NUL byte. Verbs run in order; ``VERBS`` lists them with the least number of arguments.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

VERBS = {
    "note": 1,
    "module": 2,
    "mount": 5,
    "mkdir": 2,
    "symlink": 2,
    "chmod": 2,
    "write": 2,
    "require": 3,
    "root": 1,
    "hostname": 1,
    "loopback": 0,
    "ports": 1,
    "end": 1,
    "argv": 1,
    "env": 0,
    "cwd": 1,
    "ids": 2,
    "user": 1,
    "input": 1,
    "limits": 2,
    "stdio": 3,
    "tty": 3,
    "clock": 2,
    "entropy": 1,
    "kvm": 0,
    "await": 0,
    "run": 0,
}


class Plan:
    """Collects records; ``encode`` gives the bytes of /plan.

    Arguments are file-system strings (undecodable bytes travel as surrogates). ``add`` raises
    ValueError for an unknown verb, too few arguments, or a NUL inside one: no caller may build
    a plan that /init would refuse.
    """

    __slots__ = ("records",)

    def __init__(self) -> None:
        self.records: list[tuple[str, ...]] = []

    def add(self, verb: str, *args: str | int) -> None:
        """Append one record; what each verb means is said in guests/init/init.c."""
        if verb not in VERBS or len(args) < VERBS[verb]:
            raise ValueError(f"not a record of a plan: {verb} {args!r}")
        texts = tuple(str(arg) for arg in args)
        if any("\0" in text for text in texts):
            raise ValueError(f"a NUL byte in the plan's {verb}")
        self.records.append((verb, *texts))

    def mount(
        self, fstype: str, target: str, source: str = "none", flags: str = "", data: str = ""
    ) -> None:
        """Append a mount; ``flags`` are words such as ``ro,nosuid``, ``data`` is the driver's."""
        self.add("mount", fstype, source, target, flags, data)

    def encode(self) -> bytes:
        """The bytes that /init reads."""
        out = bytearray()
        for verb, *args in self.records:
            for text in (verb, str(len(args)), *args):
                out += text.encode("utf-8", "surrogateescape") + b"\0"
        return bytes(out)


def decode(data: bytes) -> list[tuple[str, ...]]:
    """The records of an encoded plan, for messages and tests. ValueError when cut short."""
    if data and not data.endswith(b"\0"):
        raise ValueError("the plan is cut short")
    fields: Sequence[bytes] = data.split(b"\0")[:-1]
    records, at = [], 0
    while at < len(fields):
        if at + 2 > len(fields) or at + 2 + int(fields[at + 1]) > len(fields):
            raise ValueError("the plan is cut short")
        end = at + 2 + int(fields[at + 1])
        texts = (fields[at], *fields[at + 2 : end])
        records.append(tuple(text.decode("utf-8", "surrogateescape") for text in texts))
        at = end
    return records

"""What sessions are made with and end with. Apart from session.py, as that is compiled where many
of them are run (tools/asan.sh), which classes with such bases are not."""

from __future__ import annotations

from random import Random
from typing import Any


class Finding(AssertionError):
    """The device did what it must not, or not what it must."""


class Dice(Random):
    """With less ado than its base, which is careful about ranges that nobody has here."""

    def choice(self, seq: Any) -> Any:
        return seq[int(self.random() * len(seq))]

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        if stop is None:
            return int(self.random() * start)
        return start + int(self.random() * (stop - start))

"""Waiting for what happens a moment later, with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Until it is true; fails the test past ``seconds``."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.005)


def tasks() -> int:
    """Threads of this process that the kernel knows. A joined one leaves the list a moment
    after it released whoever joined it, so wait for the number."""
    return len(os.listdir("/proc/self/task"))

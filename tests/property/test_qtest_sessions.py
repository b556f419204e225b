"""Sessions of a hostile driver, as tests/property/test_virtio_sessions.py has them, with devices in
a process of their own: the same seeds, and the same twin foretells what must happen."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.fuzz.qtest import OverSocket
from tests.fuzz.session import Session
from tests.fuzz.targets import targets

TARGETS = targets(here=False)
SESSIONS = 20


@pytest.mark.parametrize("transport", ["mmio", "pci"])
@pytest.mark.parametrize("name", TARGETS)
def test_whatever_a_driver_does(name: str, transport: str, tmp_path: Path) -> None:
    executor = OverSocket(name, transport, tmp_path)
    try:
        for nr in range(SESSIONS):
            Session(executor, TARGETS[name], Random(f"test/{name}/{nr}")).run()
    finally:
        executor.close()

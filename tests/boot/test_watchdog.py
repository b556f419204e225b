"""The watchdog under Linux's own i6300esb, which the cloud kernel lacks."""

from __future__ import annotations

from typing import Any

import pytest

from guests.initramfs import build
from tests.boot.conftest import UP, Boot
from vmm.devices.watchdog import Watchdog
from vmm.guest.kernels import KernelTree, fetch_debian_kernel


@pytest.fixture(scope="module")
def tree() -> KernelTree:
    return fetch_debian_kernel("amd64")


def options(tree: KernelTree, script: str) -> dict[str, Any]:
    archive = build(f'echo "{UP}"\n{script}', tree, modules=("i6300esb",))
    return {"kernel": tree.image, "initrds": [str(archive)]}


def test_a_guest_that_does_not_feed_it(boot: Boot, tree: KernelTree) -> None:
    """busybox's watchdog opens it, sets two seconds, and feeds it once."""
    script = """\
[ -c /dev/watchdog ] && echo dog=there
watchdog -F -T 2 -t 100000 /dev/watchdog
"""
    booted = boot(watchdog="reset", **options(tree, script))
    assert booted.value("dog") == "there"
    assert (booted.result.reason, booted.result.status) == ("watchdog", 255), booted.report()
    assert "did not feed its watchdog" in booted.result.message
    assert "rip" in booted.result.diagnosis.lower()


def test_a_guest_that_closes_it(boot: Boot, tree: KernelTree) -> None:
    """The letter V before the close says that it is meant."""
    script = """\
printf V > /dev/watchdog
poweroff -f
"""
    booted = boot(watchdog=True, **options(tree, script)).ok()
    (dog,) = [d for d in booted.machine._board.pci if isinstance(d, Watchdog)]  # type: ignore[union-attr]
    assert (dog.starts, dog.fired) == (1, 0)
    assert dog.pings > 0

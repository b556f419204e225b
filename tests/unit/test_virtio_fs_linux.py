"""virtio-fs under this host's own kernel, by way of /dev/fuse: the cases of guests/tools/fstest."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from guests.tools import program
from tests import fuse_mount
from vmm.devices.virtio import fs

pytestmark = [
    pytest.mark.skipif(not fuse_mount.possible(), reason="needs root and /dev/fuse"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="fstest needs a compiler"),
]


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, ()),
        ({"locks": "host"}, ("locks", "races", "orphans")),
        ({"cache": "always"}, ("races", "times", "listings", "maps")),
        ({"writeback": True}, ("contents", "maps", "races", "orphans")),
        ({"cache": "never"}, ("races", "times", "listings", "orphans")),
    ],
    ids=str,
)
def test_what_a_file_system_does(
    tmp_path: Path, options: dict[str, str], groups: tuple[str, ...]
) -> None:
    share, mnt = tmp_path / "share", tmp_path / "mnt"
    share.mkdir()
    mnt.mkdir()
    run(share, mnt, groups, options)


def test_with_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that what is known has to be opened again all the time."""
    monkeypatch.setattr(fs, "_descriptors", lambda: 64)
    share, mnt = tmp_path / "share", tmp_path / "mnt"
    share.mkdir()
    mnt.mkdir()
    run(share, mnt, ("names", "renames", "listings", "times"), {})


def run(share: Path, mnt: Path, groups: tuple[str, ...], options: dict[str, str]) -> None:
    with fuse_mount.mounted(share, mnt, **options) as client:
        done = subprocess.run(
            [program("fstest"), mnt, *groups], stdout=subprocess.PIPE, text=True, check=False
        )
        stats = client.fs.stats()
    print(options, done.stdout.splitlines()[-1], stats["requests"], "requests")
    assert done.returncode == 0, done.stdout
    assert not list(share.iterdir())
    assert stats["handles"] == stats["waiting"] == 0

"""Fixtures of the tests of virtio-fs: a directory with a few files, shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse_client import Client
from tests.virtio_rig import TRANSPORTS


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    (path / "file").write_bytes(b"what the host wrote\n")
    (path / "dir").mkdir()
    (path / "dir" / "inner").write_bytes(b"inner")
    (path / "link").symlink_to("file")
    return path


@pytest.fixture(params=TRANSPORTS)
def client(request: pytest.FixtureRequest, share: Path) -> Iterator[Client]:
    client = Client(share, request.param)
    yield client
    client.close()


@pytest.fixture
def fs(share: Path) -> Iterator[Client]:
    client = Client(share)
    yield client
    client.close()

"""FUSE requests valid by construction, then 0 to 3 named mutations of the queue, at a share.
Whatever comes, the device answers or asks for a reset, writes only where it was given room, keeps
nothing open, touches nothing outside the share, and works afterwards."""

from __future__ import annotations

import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuse_client import IN, INIT, LOOKUP, OUT, ROOT, z
from tests.virtio_mutations import Layout
from tests.virtio_rig import Rig
from tests.virtio_target import BUFFERS, NAMES, TABLES, Target
from vmm.devices.virtio.fs import Fs

NAME = st.sampled_from(
    [b"file", b"dir", b"new", b"link", b"..", b".", b"", b"a/b", b"../outside/secret", b"n" * 255]
)
#: The first numbers that a session gives out, some that it has not, and nonsense.
NODE = st.sampled_from([1, 1, 1, 2, 2, 3, 4, 1 << 32 | 2, 0, (1 << 64) - 1])
WORD = st.one_of(st.sampled_from([0, 1, 2, 3, 64, 4096, 1 << 31, 1 << 63]), st.integers(0, 1 << 64))


def words(fmt: str, *values: st.SearchStrategy[int] | int) -> st.SearchStrategy[bytes]:
    """A struct whose fields are numbers cut to what they have room for."""
    sizes = [8 if c == "Q" else 4 for c in fmt]
    made = [v if isinstance(v, st.SearchStrategy) else st.just(v) for v in values]
    return st.tuples(*made).map(
        lambda got: b"".join(
            (v & (1 << 8 * n) - 1).to_bytes(n, "little") for v, n in zip(got, sizes, strict=True)
        )
    )


def joined(*parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(*parts).map(b"".join)


HANDLE = st.sampled_from([1, 1, 1, 2, 3, 1 << 32 | 1, 0])
TEXT = NAME.map(z)
IO = words("QQIIQII", HANDLE, WORD, st.sampled_from([0, 1, 100, 4096, 1 << 32]), 0, 0, 0, 0)
#: op -> arguments.
REQUESTS: dict[int, st.SearchStrategy[bytes]] = {
    LOOKUP: TEXT,
    2: words("Q", WORD),
    3: words("IIQ", st.sampled_from([0, 1]), 0, HANDLE),
    4: words(
        "IIQQQQQQIIIIIIII", st.integers(0, 1 << 12), 0, HANDLE, WORD, 0, WORD, WORD, 0, 0, 0, 0,
        st.sampled_from([0o644, 0o7777, 1 << 31]), 0, 0, 0, 0,
    ),
    5: st.just(b""),
    6: joined(TEXT, TEXT),
    8: joined(words("IIII", st.sampled_from([0o100644, 0o10644, 0o20644, 0]), WORD, 0, 0), TEXT),
    9: joined(words("II", 0o755, 0), TEXT),
    10: TEXT,
    11: TEXT,
    12: joined(words("Q", NODE), TEXT, TEXT),
    13: joined(words("Q", NODE), TEXT),
    14: words("II", st.sampled_from([0, 1, 2, 0o1002, 0o2001, 3, 1 << 31]), 0),
    15: IO,
    16: joined(IO, st.binary(max_size=200)),
    17: st.just(b""),
    18: words("QIIQ", HANDLE, 0, 0, 0),
    20: words("QII", HANDLE, st.sampled_from([0, 1]), 0),
    21: joined(words("II", st.sampled_from([0, 3, 1 << 31]), 0), TEXT, st.binary(max_size=9)),
    22: joined(words("II", st.sampled_from([0, 100, 1 << 31]), 0), TEXT),
    23: words("II", st.sampled_from([0, 100]), 0),
    27: words("II", 0, 0),
    28: IO,
    29: words("QIIQ", HANDLE, 0, 0, 0),
    31: words("QQQQIIII", HANDLE, WORD, WORD, WORD, st.sampled_from([0, 1, 2, 9]), 0, 0, 0),
    32: words("QQQQIIII", HANDLE, WORD, WORD, WORD, st.sampled_from([0, 1, 2, 9]), 0, 0, 0),
    35: joined(words("IIII", st.sampled_from([0o302, 0o102, 0o1102]), 0o644, 0, 0), TEXT),
    38: st.just(b""),
    42: joined(words("II", WORD, 0), st.binary(max_size=64)),
    43: words("QQQII", HANDLE, WORD, st.sampled_from([1, 4096, 1 << 63]), st.integers(0, 99), 0),
    44: IO,
    45: joined(words("QII", NODE, st.integers(0, 7), 0), TEXT, TEXT),
    46: words("QQII", HANDLE, WORD, st.integers(0, 5), 0),
    47: words("QQQQQQQ", HANDLE, WORD, NODE, HANDLE, WORD, st.sampled_from([1, 4096]), 0),
    50: st.just(bytes(8)),
    51: joined(words("IIII", st.sampled_from([2, 1]), 0o600, 0, 0), TEXT),
}  # fmt: skip
REQUEST = st.sampled_from(sorted(REQUESTS)).flatmap(
    lambda op: st.fixed_dictionaries(
        {
            "op": st.just(op),
            "node": NODE,
            "body": REQUESTS[op],
            "lie": st.sampled_from([0, 0, 0, 0, 0, 0, 1, -1, 1 << 31]),
            "room": st.sampled_from([144, 144, 4096, 300, 16, 0]),
            "cut": st.integers(0, 90),
            "indirect": st.booleans(),
        }
    )
)
MUTATION = st.tuples(st.sampled_from(NAMES), st.integers(0, 60), st.integers(0, 0xFFFF))


class FsTarget(Target):
    """One share that lives through all examples."""

    def __init__(self, home: Path, options: dict[str, Any]) -> None:
        self.home = home
        self.share = home / "share"
        self.share.mkdir()
        (home / "outside").mkdir()
        (home / "outside" / "secret").write_bytes(b"secret")
        self.options = options
        self.refresh()
        self.fs = Fs(str(self.share), **options)
        super().__init__(Rig(self.fs, "mmio"))

    def refresh(self) -> None:
        """What every example finds."""
        if self.options.get("ro") and (self.share / "file").exists():
            return
        for entry in os.scandir(self.share):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        (self.share / "dir").mkdir()
        (self.share / "file").write_bytes(b"harmless" * 100)
        (self.share / "link").symlink_to("../outside/secret")

    def untouched(self) -> None:
        outside = self.home / "outside"
        assert os.listdir(outside) == ["secret"]
        assert (outside / "secret").read_bytes() == b"secret"
        assert sorted(os.listdir(self.home)) == ["outside", "share"]

    def nothing_left(self) -> None:
        stats = self.fs.stats()
        assert (stats["inodes"], stats["handles"], stats["fds"], stats["waiting"]) == (1, 0, 0, 0)

    def check_alive(self) -> None:
        driver = self.rig.driver
        driver.next = BUFFERS
        self.rig.memory.write(0, bytes(BUFFERS + 0x8000))
        driver.start(size=16)
        for op, body, room in ((INIT, INIT_BODY, 64), (LOOKUP, b"dir\0", 128)):
            message = IN.pack(IN.size + len(body), op, 1, ROOT, 0, 0, 1, 0, 0) + body
            length, answer = driver.queues[1].request([message], [OUT.size + room])
            assert OUT.unpack_from(answer)[1] == 0
            assert length == OUT.size + room
        driver.reset()


INIT_BODY = struct.pack("<IIII48x", 7, 38, 1 << 17, 0xFFFF_FFFF)


@pytest.fixture(scope="module", params=["plain", "ro", "locks"])
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FsTarget]:
    options: dict[str, dict[str, Any]] = {
        "plain": {"uid": "squash"},
        "ro": {"ro": True, "cache": "always"},
        "locks": {"locks": "host", "writeback": True, "uid": "squash"},
    }
    made = FsTarget(tmp_path_factory.mktemp("fs"), options[request.param])
    fds = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) <= fds
    made.close()
    made.rig.close()


def until_answered(target: FsTarget, ring: Any) -> None:
    """Workers answer in their own time, in whatever order."""
    deadline = time.monotonic() + 5
    while not target.broken and ring.memory.read_int(ring.used + 2, 2) != ring.avail_idx:
        assert time.monotonic() < deadline, "neither an answer nor DEVICE_NEEDS_RESET"
        time.sleep(0.0002)


@settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=6),
    mutations=st.lists(MUTATION, max_size=3),
)
def test_whatever_the_guest_asks(
    target: FsTarget, requests: list[dict[str, Any]], mutations: list[tuple[str, int, int]]
) -> None:
    ring = target.ring()
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    first = {"op": INIT, "node": 0, "body": INIT_BODY, "lie": 0, "room": 64, "cut": 0}
    for unique, r in enumerate([{**first, "indirect": False}, *requests]):
        size = IN.size + len(r["body"])
        header = (size + r["lie"]) & 0xFFFF_FFFF, r["op"], unique, r["node"], 0, 0, 1, 0, 0
        data = IN.pack(*header) + r["body"]
        ring.memory.write(at, data)
        cut = r["cut"]
        parts = [(at, cut), (at + cut, size - cut)] if 0 < cut < size else [(at, size)]
        if len(ring.free) < len(parts) + 2:
            break
        room = [(at + 0x800, OUT.size), (at + 0x900, r["room"])][: 1 + (r["room"] > 0)]
        lay.chain(parts, room, indirect=table if r["indirect"] else None)
        at += 0x2000
        table += 0x100
    for name, which, n in mutations:
        lay.mutate(name, which, n)
    room, writable, verdict = target.foresee(ring)
    target.start(ring, 1, {})
    until_answered(target, ring)
    if verdict not in ("empty", "chain"):
        assert target.broken, f"the queue is broken ({verdict}) and the device did not say so"
    target.finish(ring, room, writable)
    target.nothing_left()
    target.untouched()
    target.refresh()
    target.check_alive()

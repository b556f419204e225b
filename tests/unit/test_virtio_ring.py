"""Both device sides of both ring formats, by one suite: virtio-v1.3 §2.7, §2.8."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.virtio_ring import (
    EVENT_IDX,
    INDIRECT,
    PACKED,
    RINGS,
    DriverRing,
    NativeQueue,
    PackedRing,
    device_side,
)
from vmm._native import ffi, lib
from vmm.devices.virtio.queue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    VERDICTS,
    Queue,
)
from vmm.memory import GuestMemory

RAM = 0x40000
HIGH = 1 << 32
BUF = 0x10000
TABLE = 0x20000
W = DESC_F_WRITE
N = DESC_F_NEXT
IND = DESC_F_INDIRECT

Device = Queue | NativeQueue


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Two ranges with a hole between them."""
    m = GuestMemory([(0, RAM), (HIGH, RAM)])
    yield m
    m.close()


@pytest.fixture(params=["python", "c"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(RINGS))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ring(memory: GuestMemory, form: str) -> DriverRing:
    return RINGS[form](memory, 8)


@pytest.fixture
def split(memory: GuestMemory) -> DriverRing:
    return DriverRing(memory, 8)


@pytest.fixture
def packed(memory: GuestMemory) -> PackedRing:
    return PackedRing(memory, 8)


def test_verdict_names_agree() -> None:
    names = [ffi.string(lib.vmm_vq_verdict_name(i)).decode() for i in range(lib.VMM_VQ_NR_VERDICTS)]
    assert names == list(VERDICTS)


def test_takes_a_chain_in_order(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring)
    assert q.pop() is None
    assert q.verdict == "empty"
    head = ring.add([(BUF, 16), (BUF + 64, 512)], [(HIGH, 4096), (BUF + 0x1000, 1)])
    chain = q.pop()
    assert chain is not None
    assert chain.head == head
    assert chain.readable == [(BUF, 16), (BUF + 64, 512)]
    assert chain.writable == [(HIGH, 4096), (BUF + 0x1000, 1)]
    assert (chain.read_len, chain.write_len) == (528, 4097)
    assert q.inflight == 1
    q.push(chain, 4097)
    assert ring.reap() == [(head, 4097)]
    assert q.inflight == 0
    assert q.pop() is None


def test_used_len_never_exceeds_what_is_writable(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring)
    ring.add([(BUF, 16)], [(BUF + 64, 10)])
    chain = q.pop()
    assert chain is not None
    q.push(chain, 1 << 40)
    assert ring.reap()[0][1] == 10


def test_a_head_completes_once(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring)
    head = ring.add([(BUF, 16)], [])
    chain = q.pop()
    assert chain is not None
    q.push(chain, 0)
    q.push(chain, 0)
    assert ring.reap() == [(head, 0)]


@pytest.mark.parametrize("at", [0, 5, 0xFFF0])
def test_indices_wrap(memory: GuestMemory, kind: str, form: str, at: int) -> None:
    ring = RINGS[form](memory, 4, at=at)
    q = device_side(kind, ring, EVENT_IDX)
    for i in range(40):
        ring.add([(BUF, 1)], [(BUF + 8, 1)])
        chain = q.pop()
        assert chain is not None
        q.push(chain, i & 1)
        assert [w for _, w in ring.reap()] == [i & 1]
    assert not q.enable_kicks()
    assert ring.wants_kick(True)


def test_a_saved_queue_goes_on(ring: DriverRing, kind: str) -> None:
    """At every place of some laps, in another queue made from what this one said."""
    q = device_side(kind, ring)
    for i in range(35):
        head = ring.add([(BUF, 1)], [(BUF + 8, 1)] * (1 + i % 3))
        chain = q.pop()
        assert chain is not None
        q.push(chain, 1)
        assert ring.reap() == [(head, 1)]
        assert q.state == ring.state
        q = device_side(kind, ring)


def test_indirect_tables(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring, INDIRECT)
    ring.add([(BUF, 16)], [(BUF + 64, 512), (BUF + 1024, 1)], indirect=TABLE)
    chain = q.pop()
    assert chain is not None
    assert chain.readable == [(BUF, 16)]
    assert chain.writable == [(BUF + 64, 512), (BUF + 1024, 1)]


def test_indirect_after_direct_ones_and_unaligned(split: DriverRing, kind: str) -> None:
    """virtio-v1.3 §2.7.5.3.2: zero or more normal descriptors, then one indirect one, whose
    write flag is ignored."""
    q = device_side(kind, split, INDIRECT)
    split.set_desc(0, BUF, 16, N, 1)
    split.set_desc(1, TABLE + 3, 16, IND | W)
    split.set_desc_at(TABLE + 3, 0, BUF + 32, 8, 0, 0)
    split.publish(0)
    chain = q.pop()
    assert chain is not None
    assert chain.readable == [(BUF, 16), (BUF + 32, 8)]


def test_indirect_may_be_as_long_as_the_queue(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring, INDIRECT)
    ring.add([(BUF + 16 * i, 16) for i in range(8)], [], indirect=TABLE)
    chain = q.pop()
    assert chain is not None
    assert len(chain.readable) == 8


def two(ring: DriverRing, first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    ring.set_desc(0, first[0], first[1], first[2] | N, 1)
    ring.set_desc(1, *second)
    ring.publish(0)


def one(ring: DriverRing, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
    ring.set_desc(0, addr, length, flags, following)
    ring.publish(0)


def table(ring: DriverRing, *entries: tuple[int, int, int, int], length: int | None = None) -> None:
    for i, entry in enumerate(entries):
        ring.set_desc_at(TABLE, i, *entry)
    one(ring, TABLE, 16 * len(entries) if length is None else length, IND)


def loop_after(ring: DriverRing, k: int) -> None:
    for i in range(k):
        ring.set_desc(i, BUF, 8, N, i + 1)
    ring.set_desc(k, BUF, 8, N, k)
    ring.publish(0)


def dup_head(ring: DriverRing) -> None:
    ring.set_desc(0, BUF, 8)
    ring.publish(0)
    ring.publish(0)


def idx_back(ring: DriverRing) -> None:
    dup_head(ring)
    ring.set_avail_idx(0xFFFF)


BROKEN: list[tuple[str, Callable[[DriverRing], None]]] = [
    ("chain_long", lambda r: one(r, BUF, 8, N, 0)),
    ("chain_long", lambda r: two(r, (BUF, 8, 0), (BUF, 8, N))),
    ("chain_long", lambda r: loop_after(r, 5)),
    ("len_zero", lambda r: one(r, BUF, 0)),
    ("len_zero", lambda r: one(r, 0, 0)),
    ("len_zero", lambda r: two(r, (BUF, 8, 0), (BUF, 0, W))),
    ("addr", lambda r: one(r, BUF, 0xFFFFFFFF)),
    ("addr", lambda r: one(r, BUF, 0x80000000, W)),
    ("addr", lambda r: one(r, (1 << 64) - 8, 16)),
    ("addr", lambda r: one(r, (1 << 64) - 8, 8)),
    ("addr", lambda r: one(r, RAM - 8, 9)),
    ("addr", lambda r: one(r, RAM, 1)),
    ("addr", lambda r: one(r, HIGH - 1, 2, W)),
    ("addr", lambda r: one(r, 0xFEE00000, 4)),
    ("order", lambda r: two(r, (BUF, 8, W), (BUF, 8, 0))),
    ("next_range", lambda r: one(r, BUF, 8, N, 8)),
    ("next_range", lambda r: one(r, BUF, 8, N, 0xFFFF)),
    ("head_range", lambda r: r.publish(8)),
    ("head_range", lambda r: r.publish(0xFFFF)),
    ("head_inflight", dup_head),
    ("idx_jump", lambda r: r.set_avail_idx(9)),
    ("idx_jump", lambda r: r.set_avail_idx(16)),
    ("idx_jump", idx_back),
    ("indirect_nest", lambda r: table(r, (TABLE, 16, IND, 0))),
    ("indirect_next", lambda r: one(r, TABLE, 16, IND | N, 1)),
    ("indirect_len", lambda r: table(r, (BUF, 8, 0, 0), length=0)),
    ("indirect_len", lambda r: table(r, (BUF, 8, 0, 0), length=17)),
    ("indirect_len", lambda r: table(r, (BUF, 8, 0, 0), length=16 * 9)),
    ("indirect_len", lambda r: table(r, (BUF, 8, 0, 0), length=0xFFFFFFF0)),
    ("indirect_addr", lambda r: one(r, RAM - 8, 16, IND)),
    ("indirect_addr", lambda r: one(r, (1 << 64) - 16, 32, IND)),
    ("next_range", lambda r: table(r, (BUF, 8, N, 1))),
    ("chain_long", lambda r: table(r, (BUF, 8, N, 0))),
]


def check_broken(q: Device, ring: DriverRing, verdict: str, repair: Callable[[], None]) -> None:
    before = ring.memory.read(0, RAM)
    taken = 0
    while q.pop() is not None:
        taken += 1
    assert q.verdict == verdict
    assert q.broken
    assert taken == (1 if verdict == "head_inflight" else 0)
    assert ring.memory.read(0, RAM) == before
    # It stays broken, whatever the driver repairs, asks for no kicks and touches nothing.
    repair()
    assert q.pop() is None
    assert q.verdict == verdict
    assert not q.enable_kicks()


@pytest.mark.parametrize(("verdict", "spoil"), BROKEN)
def test_broken_chains_break_the_queue(
    split: DriverRing, kind: str, verdict: str, spoil: Callable[[DriverRing], None]
) -> None:
    q = device_side(kind, split, INDIRECT | EVENT_IDX)
    spoil(split)
    check_broken(q, split, verdict, lambda: split.set_avail_idx(1))


def raws(ring: PackedRing, *descs: tuple[int, int, int, int]) -> None:
    """Descriptors as they are, the first of them offered last as a driver does."""
    for desc in descs:
        ring.raw(*desc)


def packed_table(
    ring: PackedRing, *entries: tuple[int, int, int], length: int | None = None
) -> None:
    for i, (addr, size, flags) in enumerate(entries):
        ring.set_desc_at(TABLE, i, addr, size, flags, 0)
    ring.raw(TABLE, 16 * len(entries) if length is None else length, IND)


BROKEN_PACKED: list[tuple[str, int, Callable[[PackedRing], None]]] = [
    ("chain_long", 0, lambda r: raws(r, *[(BUF, 8, N, 0)] * 8)),
    ("chain_long", 6, lambda r: raws(r, *[(BUF, 8, N, 7)] * 2, (BUF, 8, 0, 7))),
    ("idx_jump", 8, lambda r: raws(r, (BUF, 8, 0, 0))),
    ("len_zero", 0, lambda r: raws(r, (BUF, 0, 0, 0))),
    ("len_zero", 0, lambda r: raws(r, (BUF, 8, N, 0), (BUF, 0, W, 0))),
    ("len_zero", 0, lambda r: r.jump(1)),
    ("addr", 0, lambda r: raws(r, (BUF, 0xFFFFFFFF, 0, 0))),
    ("addr", 0, lambda r: raws(r, ((1 << 64) - 8, 16, 0, 0))),
    ("addr", 0, lambda r: raws(r, (RAM - 8, 9, W, 0))),
    ("addr", 0, lambda r: raws(r, (0xFEE00000, 4, 0, 0))),
    ("order", 0, lambda r: raws(r, (BUF, 8, N | W, 0), (BUF, 8, 0, 0))),
    ("head_range", 0, lambda r: raws(r, (BUF, 8, 0, 8))),
    ("head_range", 0, lambda r: raws(r, (BUF, 8, N, 1), (BUF, 8, 0, 0xFFFF))),
    ("head_inflight", 4, lambda r: raws(r, (BUF, 8, N, 4), (BUF, 8, 0, 3))),
    ("indirect_next", 0, lambda r: raws(r, (TABLE, 16, IND | N, 0))),
    ("indirect_next", 0, lambda r: raws(r, (BUF, 8, N, 0), (TABLE, 16, IND, 0))),
    ("indirect_len", 0, lambda r: packed_table(r, (BUF, 8, 0), length=0)),
    ("indirect_len", 0, lambda r: packed_table(r, (BUF, 8, 0), length=17)),
    ("indirect_len", 0, lambda r: packed_table(r, (BUF, 8, 0), length=16 * 9)),
    ("indirect_len", 0, lambda r: packed_table(r, (BUF, 8, 0), length=0xFFFFFFF0)),
    ("indirect_addr", 0, lambda r: raws(r, (RAM - 8, 16, IND, 0))),
    ("order", 0, lambda r: packed_table(r, (BUF, 8, W), (BUF, 8, 0))),
    ("len_zero", 0, lambda r: packed_table(r, (BUF, 8, N), (BUF, 0, N))),
]


@pytest.mark.parametrize(("verdict", "taken", "spoil"), BROKEN_PACKED)
def test_broken_chains_break_a_packed_queue(
    packed: PackedRing, kind: str, verdict: str, taken: int, spoil: Callable[[PackedRing], None]
) -> None:
    q = device_side(kind, packed, INDIRECT | EVENT_IDX)
    for ident in range(taken):
        packed.raw(BUF, 8, 0, ident)
        assert q.pop() is not None
    spoil(packed)
    before = packed.memory.read(0, RAM)
    assert q.pop() is None
    assert q.verdict == verdict
    assert packed.memory.read(0, RAM) == before
    packed.set_desc(0, BUF, 8, 1 << 7, 5)
    assert q.pop() is None
    assert q.verdict == verdict
    assert not q.enable_kicks()


def test_a_packed_table_has_no_flag_but_write(packed: PackedRing, kind: str) -> None:
    """virtio-v1.3 §2.8.7: its descriptors are in order, the rest of them is ignored."""
    q = device_side(kind, packed, INDIRECT)
    packed_table(packed, (BUF, 8, IND), (BUF + 8, 8, N | W), (BUF + 16, 8, N | W | 0x8080))
    chain = q.pop()
    assert chain is not None
    assert chain.readable == [(BUF, 8)]
    assert chain.writable == [(BUF + 8, 8), (BUF + 16, 8)]


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_a_packed_queue_of_any_size(memory: GuestMemory, kind: str, size: int) -> None:
    """virtio-v1.3 §2.8.10.1; chains lie over its end, and come back out of order."""
    ring = PackedRing(memory, size)
    q = device_side(kind, ring)
    for i in range(30):
        lengths = [1 + i % min(size, 3)] + [1] * (size > 3)
        heads = [ring.add([(BUF, 1)] * n, []) for n in lengths]
        chains = [q.pop() for _ in heads]
        assert q.pop() is None
        assert q.verdict == "empty"
        for chain in reversed(chains):
            assert chain is not None
            q.push(chain, 0)
        assert sorted(ring.reap()) == sorted((head, 0) for head in heads)
    assert sorted(ring.free) == list(range(size))


def test_indirect_needs_the_feature(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring, 0)
    ring.add([(BUF, 8)], [], indirect=TABLE)
    assert q.pop() is None
    assert q.verdict == "indirect_off"


def test_a_chain_of_more_than_4_gib(kind: str, form: str) -> None:
    big = GuestMemory([(0, RAM), (HIGH, 1 << 30)])
    ring = RINGS[form](big, 8)
    q = device_side(kind, ring)
    ring.add([(HIGH, 1 << 30)] * 4, [])
    chain = q.pop()
    assert chain is not None
    assert chain.read_len == 1 << 32
    q.push(chain, 0)
    ring.reap()
    ring.add([(HIGH, 1 << 30)] * 4 + [(BUF, 1)], [])
    assert q.pop() is None
    assert q.verdict == "chain_bytes"
    del q
    big.close()


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (8, 0x1008, 0x2000, 0x3000),
        (8, 0x1000, 0x2001, 0x3000),
        (8, 0x1000, 0x2000, 0x3002),
        (8, RAM - 112, 0x2000, 0x3000),
        (8, 0x1000, RAM - 20, 0x3000),
        (8, 0x1000, 0x2000, RAM - 68),
        (8, (1 << 64) - 128, 0x2000, 0x3000),
        (32768, 0x1000, 0x2000, 0x3000),
    ],
)
def test_places_where_a_queue_cannot_be(
    memory: GuestMemory, kind: str, size: int, desc: int, avail: int, used: int
) -> None:
    made: type[Queue] | type[NativeQueue] = Queue if kind == "python" else NativeQueue
    with pytest.raises(ValueError, match="queue"):
        made(memory, size, desc, avail, used, 0)


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used", "at"),
    [
        (0, 0x1000, 0x2000, 0x3000, (0, 0)),
        (32769, 0, 0x2000, 0x3000, (0, 0)),
        (8, 0x1008, 0x2000, 0x3000, (0, 0)),
        (8, 0x1000, 0x2002, 0x3000, (0, 0)),
        (8, 0x1000, 0x2000, 0x3002, (0, 0)),
        (8, RAM - 112, 0x2000, 0x3000, (0, 0)),
        (8, 0x1000, RAM, 0x3000, (0, 0)),
        (8, 0x1000, 0x2000, RAM, (0, 0)),
        (32768, 0x1000, 0x2000, 0x3000, (0, 0)),
        (8, 0x1000, 0x2000, 0x3000, (8, 0)),
        (8, 0x1000, 0x2000, 0x3000, (0, 0x8008)),
    ],
)
def test_places_where_a_packed_queue_cannot_be(
    memory: GuestMemory,
    kind: str,
    size: int,
    desc: int,
    avail: int,
    used: int,
    at: tuple[int, int],
) -> None:
    made: type[Queue] | type[NativeQueue] = Queue if kind == "python" else NativeQueue
    with pytest.raises(ValueError, match="queue"):
        made(memory, size, desc, avail, used, PACKED, at)


@pytest.mark.parametrize("size", [32768, 32767])
def test_the_longest_queue(kind: str, size: int) -> None:
    """A chain over all of it, twice: positions and counters at their limits."""
    big = GuestMemory([(0, 1 << 20)])
    ring = PackedRing(big, size)
    q = device_side(kind, ring, EVENT_IDX)
    for _ in range(2):
        head = ring.add([(0x1000, 1)] * size, [])
        ring.want_interrupt_after(size - 1)
        chain = q.pop()
        assert chain is not None
        assert len(chain.readable) == size
        q.push(chain, 0)
        assert q.should_notify()
        assert ring.reap() == [(head, 0)]
        assert not q.enable_kicks()
        assert ring.wants_kick(True)
    del q
    big.close()


def serve_one(ring: DriverRing, q: Device) -> None:
    ring.add([(BUF, 8)], [])
    chain = q.pop()
    assert chain is not None
    q.push(chain, 0)


def test_interrupts_without_event_idx(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring)
    assert not q.should_notify()
    for wanted in (True, False, True):
        ring.want_interrupts(wanted)
        serve_one(ring, q)
        assert q.should_notify() is wanted
        assert not q.should_notify()
        ring.reap()


@pytest.mark.parametrize("start", range(9))
def test_interrupts_with_event_idx(memory: GuestMemory, form: str, kind: str, start: int) -> None:
    """The driver asks for one interrupt when a certain descriptor is used, wherever in the ring
    that is: §2.7.7.2, §2.8.9."""
    ring = RINGS[form](memory, 8, at=start)
    q = device_side(kind, ring, EVENT_IDX)
    if form == "split":
        ring.want_interrupts(False)  # MUST be ignored then
    told = []
    ring.want_interrupt_after(3)
    for _ in range(6):
        serve_one(ring, q)
        told.append(q.should_notify())
        ring.reap()
    assert told == [False, False, False, True, False, False]


@pytest.mark.parametrize("start", range(9))
@pytest.mark.parametrize(("after", "told"), [(0, True), (3, True), (4, False), (7, False)])
def test_one_question_covers_a_batch(
    memory: GuestMemory, form: str, kind: str, start: int, after: int, told: bool
) -> None:
    ring = RINGS[form](memory, 8, at=start)
    q = device_side(kind, ring, EVENT_IDX)
    ring.want_interrupt_after(after)
    for _ in range(4):
        serve_one(ring, q)
    assert q.should_notify() is told
    assert not q.should_notify()


def test_packed_events_by_descriptor_need_the_feature(packed: PackedRing, kind: str) -> None:
    """Without EVENT_IDX the flags' other values all mean that events are wanted."""
    q = device_side(kind, packed)
    packed.want_interrupt_after(5)
    serve_one(packed, q)
    assert q.should_notify()
    packed.memory.write_int(packed.avail, 3 << 16, 4)
    serve_one(packed, q)
    assert q.should_notify()


def test_a_device_may_refuse_a_chain(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring)
    ring.add([(BUF, 8)], [])
    assert q.pop() is not None
    q.refuse()
    assert q.broken
    ring.add([(BUF, 8)], [])
    assert q.pop() is None
    assert q.verdict == "request"


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_kicks(ring: DriverRing, kind: str, features: int) -> None:
    q = device_side(kind, ring, features)
    event = bool(features)
    for _ in range(20):
        assert not q.enable_kicks()
        assert ring.wants_kick(event)
        q.disable_kicks()
        assert ring.wants_kick(event) is event  # it is left behind as soon as one is added
        ring.add([(BUF, 8)], [])
        assert q.enable_kicks(), "a chain that came while kicks were off must not be lost"
        chain = q.pop()
        assert chain is not None
        assert event is not ring.wants_kick(event)
        q.push(chain, 0)
        ring.reap()


def test_a_full_queue_in_flight(ring: DriverRing, kind: str) -> None:
    q = device_side(kind, ring)
    heads = [ring.add([], [(BUF + 8, 8)]) for _ in range(8)]
    chains = [q.pop() for _ in heads]
    assert q.inflight == 8
    assert q.pop() is None
    assert q.verdict == "empty"
    for chain in reversed(chains):
        assert chain is not None
        q.push(chain, 8)
    assert ring.reap() == [(head, 8) for head in reversed(heads)]


def test_a_driver_that_rewrites_while_the_device_walks(memory: GuestMemory, form: str) -> None:
    """Another thread flips addresses, lengths and indices; every chain given out is RAM."""
    import threading

    ring = RINGS[form](memory, 8)
    stop = threading.Event()

    def flip() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            flags = (N if i & 2 else 0) | (1 << 7 if form == "packed" else 0)
            ring.set_desc(0, BUF if i & 1 else RAM - 1, 1 + (i & 8), flags, i & 15)
            ring.set_desc(1, HIGH + (i & 0xFF), 16, W | (N if i & 4 else 0), i & 3)

    thread = threading.Thread(target=flip)
    thread.start()
    verdicts: set[str] = set()
    rounds = 0
    try:
        # Until the other thread had its turns: on a busy host that takes a while.
        while rounds < 3000 or not {"chain", "addr"} <= verdicts:
            q = device_side("c", ring)
            if form == "split":
                ring.publish(0)
            q.pop()
            verdicts.add(q.verdict)
            rounds += 1
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("start", [0, 13, 15])
def test_several_given_back_at_once(memory: GuestMemory, ring: str, start: int) -> None:
    """As one after the other, with the bytes spread over them; also around the ring's end."""
    driver = RINGS[ring](memory, 16)
    native = device_side("c", driver)
    assert isinstance(native, NativeQueue)
    for _ in range(start):
        driver.add([], [(0x8000, 8)])
        chain = native.pop()
        assert chain is not None
        native.push(chain, 0)
    driver.reap()
    heads = [driver.add([], [(0x8000 + 64 * i, 20)]) for i in range(4)]
    chains = [chain for _ in heads if (chain := native.pop()) is not None]
    native.push_span(chains[:1] + chains[1:3], 45)
    assert driver.reap() == [(heads[0], 20), (heads[1], 20), (heads[2], 5)]
    native.push_span([chains[0], chains[3]], 25)  # the first is not in flight any more
    assert driver.reap() == [(heads[3], 5)]
    assert native.inflight == 0

"""virtio-balloon from the driver's side: virtio-v1.3 §5.5."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.memory_cost import resident
from tests.virtio_mock import DRIVER_OK, FEATURES_OK, Queue
from tests.virtio_rig import HIGH, RAM, TRANSPORTS, Rig
from vmm._native import lib
from vmm.devices.virtio import balloon
from vmm.devices.virtio.balloon import PAGE, Balloon
from vmm.devices.virtio.device import F_RING_PACKED
from vmm.errors import ConfigError, VmmError

INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
ALL = (1 << 64) - 1
#: Where the driver's own things end, and the pages that tests give away begin.
FREE = 2 << 20


class BalloonRig(Rig):
    device: Balloon

    def config_word(self, offset: int) -> int:
        return self.regs.config(offset, 4)

    def queue(self, index: int) -> Queue:
        return self.driver.queues[index]

    def fill(self) -> None:
        """Every page beyond FREE is touched; the rings already were."""
        self.settle()
        for start, size in ((FREE, RAM - FREE), (HIGH, 1 << 20)):
            self.memory.write(start, b"\xa5" * size)

    def offer_pages(self, index: int, ranges: list[tuple[int, int]]) -> None:
        """Offer guest memory itself as the buffers of one chain, and wait for it to be used."""
        q = self.queue(index)
        slots = [q.free.pop(0) for _ in ranges]
        for nr, (gpa, size) in enumerate(ranges):
            last = nr == len(ranges) - 1
            q.write_desc(slots[nr], gpa, size, 2 | (0 if last else 1), 0 if last else slots[nr + 1])
        q.pending[slots[0]] = (slots, [(gpa, size) for gpa, size in ranges])
        q.offer(slots[0])
        q.kick()
        assert q.wait()[1] == 0


def pfns(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


Make = Callable[..., BalloonRig]


@pytest.fixture
def make() -> Iterator[Make]:
    rigs: list[BalloonRig] = []

    def new(
        transport: str = "mmio",
        backing: str = "anon",
        packed: bool = False,
        **options: object,
    ) -> BalloonRig:
        device = Balloon(**options)  # type: ignore[arg-type]
        rigs.append(BalloonRig(device, transport, backing=backing, packed=packed))
        return rigs[-1]

    yield new
    for rig in rigs:
        rig.close()


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest, make: Make) -> BalloonRig:
    return make(request.param)


@pytest.mark.parametrize("backing", ["anon", "memfd"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_inflated_pages_go_back_to_the_host(make: Make, transport: str, backing: str) -> None:
    rig = make(transport, backing)
    rig.driver.start()
    rig.fill()
    before = resident(rig.memory.ranges)
    # Downwards, as Linux allocates, and every other page of the upper range.
    down = range((RAM >> 12) - 1, (RAM >> 12) - 257, -1)
    odd = range((HIGH >> 12) + 1, (HIGH >> 12) + 256, 2)
    assert rig.queue(INFLATE).request([pfns(*down)], [])[0] == 0
    assert rig.queue(INFLATE).request([pfns(*odd)], [])[0] == 0
    assert resident(rig.memory.ranges) == before - (256 + 128) * PAGE
    assert rig.device.counts() == {
        "inflated": 384 * PAGE, "reported": 0, "failed": 0, "ignored": 0,
    }  # fmt: skip
    assert rig.memory.read(RAM - (1 << 20), 1 << 20) == bytes(1 << 20)
    assert rig.memory.read(RAM - (1 << 20) - 16, 16) == b"\xa5" * 16
    assert rig.memory.read(HIGH, 2 * PAGE) == b"\xa5" * PAGE + bytes(PAGE)
    # A page that the guest takes back is there.
    assert rig.queue(DEFLATE).request([pfns(down[0])], [])[0] == 0
    rig.memory.write(RAM - 8, b"deflated")
    assert rig.memory.read(RAM - 8, 8) == b"deflated"


def test_pages_that_are_not_ram_are_ignored(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.fill()
    first, last = (RAM >> 12) - 1, (HIGH >> 12) + 255
    named = [first, first + 1, 0xFEE00, 0xFFFFFFFF, last, last + 1, 0xFFFFFFFF, last]
    rig.queue(INFLATE).request([pfns(*named)], [])
    counts = rig.device.counts()
    assert (counts["inflated"], counts["ignored"]) == (2 * PAGE, 4)
    rig.queue(DEFLATE).request([pfns(*named)], [])
    assert not rig.broken


def test_a_long_array_over_many_buffers(rig: BalloonRig) -> None:
    """More than one turn's work, split where no page number ends."""
    rig.driver.start()
    rig.fill()
    one = pfns(*range(FREE >> 12, RAM >> 12))
    data = one * 40
    cut = [data[:1], data[1:3001], data[3001:]]
    assert rig.queue(INFLATE).request(cut, [64])[0] == 0
    assert rig.device.counts()["inflated"] == 40 * (RAM - FREE)
    assert rig.memory.read(FREE, RAM - FREE) == bytes(RAM - FREE)


@pytest.mark.parametrize(
    ("queue", "readable", "writable"),
    [
        (INFLATE, [b"123"], []),
        (INFLATE, [b"12345"], []),
        (INFLATE, [], [16]),
        (DEFLATE, [b"12345678", b"1"], []),
        (HINT, [b"123"], []),
        (REPORT, [b"1234"], []),
    ],
)
def test_chains_that_make_no_sense(
    rig: BalloonRig, queue: int, readable: list[bytes], writable: list[int]
) -> None:
    rig.driver.start()
    rig.queue(queue).add(readable, writable)
    rig.queue(queue).kick()
    rig.until_broken()
    rig.driver.reset()
    rig.driver.start()
    assert rig.queue(INFLATE).request([pfns(FREE >> 12)], [])[0] == 0
    assert rig.device.counts()["inflated"] == PAGE


def test_the_target_is_told(make: Make) -> None:
    rig = make("pci", target=1 << 20)
    assert rig.config_word(0) == 256
    rig.device.set_target(2 << 20)
    rig.driver.start()
    assert (rig.config_word(0), rig.device.target) == (512, 2 << 20)
    rig.regs.interrupts()
    before = rig.regs.generation()
    rig.device.set_target(3 << 20)
    assert rig.regs.interrupts() & 2
    assert rig.regs.generation() != before
    assert rig.config_word(0) == 768
    with pytest.raises(ConfigError, match="larger than the guest's memory"):
        rig.device.set_target(1 << 30)
    assert rig.device.target == 3 << 20
    with pytest.raises(ConfigError):
        rig.device.set_target(-1)


def test_what_the_driver_may_write(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.regs.set_config(4, 4, 300)
    assert rig.device.actual == 300 * PAGE
    rig.regs.set_config(4, 4, 0xFFFFFFFF)
    assert rig.device.actual == rig.memory.size
    for offset in (0, 8):
        rig.regs.set_config(offset, 4, 0x12345678)
        assert rig.config_word(offset) == 0
    rig.regs.set_config(5, 1, 1)
    rig.driver.reset()
    assert rig.device.actual == 0


def test_reported_pages_go_back_and_keep_their_edges(rig: BalloonRig) -> None:
    features = rig.driver.start()
    assert features >> balloon.F_PAGE_REPORTING & 1
    rig.fill()
    before = resident(rig.memory.ranges)
    rig.offer_pages(REPORT, [(FREE, 1 << 20), (HIGH + 100, 3 * PAGE), (FREE + 0x180000, 100)])
    assert resident(rig.memory.ranges) == before - (1 << 20) - 2 * PAGE
    assert rig.device.counts()["reported"] == (1 << 20) + 2 * PAGE
    assert rig.memory.read(FREE, 1 << 20) == bytes(1 << 20)
    assert rig.memory.read(HIGH, PAGE) == b"\xa5" * PAGE
    assert rig.memory.read(HIGH + PAGE, 2 * PAGE) == bytes(2 * PAGE)
    assert rig.memory.read(HIGH + 3 * PAGE, PAGE) == b"\xa5" * PAGE


def test_pages_of_a_guest_that_poisons_them_stay(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.fill()
    rig.regs.set_config(12, 4, 0xAAAAAAAA)
    rig.offer_pages(REPORT, [(FREE, PAGE)])
    assert rig.memory.read(FREE, PAGE) == b"\xa5" * PAGE
    rig.regs.set_config(12, 4, 0)
    rig.offer_pages(REPORT, [(FREE, PAGE)])
    assert rig.memory.read(FREE, PAGE) == bytes(PAGE)
    # Without the feature nobody has a say.
    rig.regs.set_config(12, 4, 0xAAAAAAAA)
    rig.driver.reset()
    rig.driver.start(wanted=ALL & ~(1 << balloon.F_PAGE_POISON))
    rig.memory.write(FREE, b"\xa5" * PAGE)
    rig.offer_pages(REPORT, [(FREE, PAGE)])
    assert rig.memory.read(FREE, PAGE) == bytes(PAGE)


def test_reporting_and_oom_can_be_left_out(make: Make) -> None:
    features = make(reporting=False, deflate_on_oom=False).regs.features()
    assert not features >> balloon.F_PAGE_REPORTING & 1
    assert not features >> balloon.F_DEFLATE_ON_OOM & 1
    assert make().regs.features() >> balloon.F_DEFLATE_ON_OOM & 1


def test_closing_ends_what_waits() -> None:
    """The machine may close while a thread waits for a guest that never answers."""
    rig = BalloonRig(Balloon(), "mmio")
    rig.driver.start()
    entered, raised = threading.Event(), []

    def ask() -> None:
        entered.set()
        try:
            rig.device.stats(timeout=60)
        except VmmError as e:
            raised.append(e)

    asking = threading.Thread(target=ask)
    asking.start()
    entered.wait()
    rig.close()
    asking.join(30)
    assert raised


def test_on_packed_queues(make: Make) -> None:
    rig = make(packed=True)
    assert rig.driver.start() >> F_RING_PACKED & 1
    rig.fill()
    for first in range(512, 1024, 256):
        assert rig.queue(INFLATE).request([pfns(*range(first, first + 256))], [])[0] == 0
    assert rig.memory.read(FREE, RAM - FREE) == bytes(RAM - FREE)
    q = rig.queue(STATS)
    for n in range(3):
        q.add([STAT.pack(4, n)], [])
        q.kick()
        rig.until(lambda n=n: rig.device.last_stats() == {"free_memory": n}, "an answer")  # type: ignore[misc]
        lib.vmm_balloon_ask(rig.device._lent.native)
        q.wait()


def test_one_queue_is_reset(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.fill()
    q = rig.queue(STATS)
    q.add([STAT.pack(4, 1)], [])
    q.kick()
    rig.settle()
    assert rig.regs.reset_queue(STATS)
    assert rig.queue(INFLATE).request([pfns(FREE >> 12)], [])[0] == 0
    again = rig.driver.setup_queue(STATS)
    again.add([STAT.pack(4, 2)], [])
    again.kick()
    rig.until(lambda: rig.device.last_stats() == {"free_memory": 2}, "an answer")
    assert not rig.broken


STAT = struct.Struct("<HQ")


def test_statistics_when_asked(rig: BalloonRig) -> None:
    rig.driver.start()
    with pytest.raises(VmmError, match="is it loaded"):
        rig.device.stats(timeout=0.01)
    assert rig.device.last_stats() == {}
    q = rig.queue(STATS)
    q.add([STAT.pack(4, 1000) + STAT.pack(5, 2000)], [])
    q.kick()
    rig.settle()
    assert rig.device.last_stats() == {"free_memory": 1000, "total_memory": 2000}
    assert q.take() is None, "the buffer stays until the next contents are wanted"
    got: list[dict[str, int]] = []
    asking = threading.Thread(target=lambda: got.append(rig.device.stats(timeout=10)))
    asking.start()
    q.wait()
    # Unknown tags are skipped, and what is not a whole entry.
    q.add([STAT.pack(4, 500) + STAT.pack(77, 1), STAT.pack(8, 3) + b"xyz"], [])
    q.kick()
    asking.join()
    assert got == [{"free_memory": 500, "hugetlb_allocations": 3}]


def test_statistics_at_an_interval(make: Make) -> None:
    rig = make(stats=0.01)
    rig.driver.start()
    q = rig.queue(STATS)
    for n in range(3):
        q.add([STAT.pack(4, n)], [])
        q.kick()
        q.wait()  # nobody asked but the clock
        assert rig.device.last_stats() == {"free_memory": n}
    rig.device.poll_stats(None)
    q.add([STAT.pack(4, 99)], [])
    q.kick()
    rig.until(lambda: rig.device.last_stats() == {"free_memory": 99}, "the last answer")


def test_statistics_are_bounded_and_survive_a_reset(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.queue(STATS).add([STAT.pack(4, 7) * 1000], [])
    rig.queue(STATS).add([STAT.pack(4, 8)], [])
    rig.queue(STATS).kick()
    rig.settle()
    assert rig.device.last_stats() == {"free_memory": 7}
    rig.driver.reset()
    assert rig.device.last_stats() == {"free_memory": 7}
    rig.driver.start()
    rig.queue(STATS).add([STAT.pack(4, 9)], [])
    rig.queue(STATS).kick()
    rig.until(lambda: rig.device.last_stats() == {"free_memory": 9}, "an answer")


def test_hints(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.fill()
    rig.regs.interrupts()
    rig.device.start_hints()
    assert rig.regs.interrupts() & 2
    wanted = rig.config_word(8)
    assert wanted >= 2
    q = rig.queue(HINT)
    q.request([struct.pack("<I", wanted - 1)], [])
    rig.offer_pages(HINT, [(FREE, PAGE)])  # of another round
    q.request([struct.pack("<I", wanted)], [])
    rig.offer_pages(HINT, [(FREE + PAGE, 3 * PAGE)])
    rig.offer_pages(HINT, [(FREE + 4 * PAGE, PAGE), (HIGH + 1, 2 * PAGE)])
    with pytest.raises(VmmError):
        rig.device.hints(timeout=0.01)
    q.request([struct.pack("<I", 0)], [])
    rig.offer_pages(HINT, [(RAM - PAGE, PAGE)])  # too late
    expect = [(FREE + PAGE, 4 * PAGE), (HIGH + PAGE, PAGE)]
    assert rig.device.hints() == expect
    assert rig.memory.read(FREE, 8 * PAGE) == b"\xa5" * 8 * PAGE, "hints take nothing away"
    rig.device.end_hints()
    assert rig.config_word(8) == 1
    with pytest.raises(VmmError):
        rig.device.hints(timeout=0.01)
    rig.device.start_hints()
    assert rig.config_word(8) == wanted + 1


def test_hints_end_with_a_reset(rig: BalloonRig) -> None:
    rig.driver.start()
    rig.device.start_hints()
    wanted = rig.config_word(8)
    rig.queue(HINT).request([struct.pack("<I", wanted)], [])
    rig.offer_pages(HINT, [(FREE, PAGE)])
    rig.driver.reset()
    with pytest.raises(VmmError, match="did not say"):
        rig.device.hints(timeout=60)


@pytest.fixture
def hugetlb(monkeypatch: pytest.MonkeyPatch, make: Make) -> BalloonRig:
    """RAM that goes 2 MiB at a time, as on a hugetlb file."""
    attach = Balloon.attach

    def with_large_pages(self: Balloon, memory: object, loop: object) -> None:
        memory.page = 2 << 20  # type: ignore[attr-defined]
        lib.vmm_mem_lend(memory.table, 0, 2 << 20, lib.MADV_DONTNEED)  # type: ignore[attr-defined]
        attach(self, memory, loop)  # type: ignore[arg-type]

    monkeypatch.setattr(Balloon, "attach", with_large_pages)
    return make()


def test_a_large_page_goes_once_all_of_it_is_in_the_balloon(hugetlb: BalloonRig) -> None:
    rig = hugetlb
    assert rig.driver.start() & 1 << balloon.F_MUST_TELL_HOST
    rig.fill()
    q, last = rig.queue(INFLATE), 1023
    q.request([pfns(*range(512, last))], [])
    rig.queue(DEFLATE).request([pfns(600)], [])
    q.request([pfns(last)], [])
    assert rig.memory.read(FREE, RAM - FREE) == b"\xa5" * (RAM - FREE)
    q.request([pfns(600)], [])
    assert rig.memory.read(FREE, RAM - FREE) == bytes(RAM - FREE)
    assert rig.device.counts()["inflated"] == RAM - FREE


def test_what_was_inflated_before_a_reset_counts_no_more(hugetlb: BalloonRig) -> None:
    rig = hugetlb
    rig.driver.start()
    rig.fill()
    rig.queue(INFLATE).request([pfns(*range(512, 1023))], [])
    rig.driver.reset()
    rig.driver.start()
    rig.queue(INFLATE).request([pfns(1023)], [])
    assert rig.memory.read(FREE, RAM - FREE) == b"\xa5" * (RAM - FREE)


def test_a_driver_that_does_not_tell_loses_no_part_of_a_large_page(hugetlb: BalloonRig) -> None:
    rig = hugetlb
    rig.driver.start(wanted=ALL & ~(1 << balloon.F_MUST_TELL_HOST))
    rig.fill()
    for first in (512, 768):
        rig.queue(INFLATE).request([pfns(*range(first, first + 256))], [])
    assert rig.memory.read(FREE, RAM - FREE) == b"\xa5" * (RAM - FREE)
    rig.offer_pages(REPORT, [(FREE, RAM - FREE)])
    assert rig.memory.read(FREE, RAM - FREE) == bytes(RAM - FREE)


def test_queues_numbered_without_gaps() -> None:
    bits = balloon.F_STATS_VQ, balloon.F_FREE_PAGE_HINT, balloon.F_PAGE_REPORTING
    every = sum(1 << bit for bit in bits)
    numbered = [0, 1, 2, 3, 4]
    assert balloon.queue_roles(every, [0, 1, 2, 3, 4]) == numbered
    assert balloon.queue_roles(0, [0, 1]) == numbered
    report = 1 << balloon.F_PAGE_REPORTING
    assert balloon.queue_roles(report, [0, 1, 4]) == numbered
    assert balloon.queue_roles(report, [0, 1, 2]) == [0, 1, REPORT, 5, 5]


def test_a_driver_that_numbers_without_gaps(rig: BalloonRig) -> None:
    rig.driver.negotiate(ALL & ~(1 << balloon.F_STATS_VQ | 1 << balloon.F_FREE_PAGE_HINT))
    for index in range(3):
        rig.driver.setup_queue(index)
    rig.regs.status = 3 | FEATURES_OK | DRIVER_OK
    rig.fill()
    rig.offer_pages(2, [(FREE, PAGE)])
    assert rig.memory.read(FREE, PAGE) == bytes(PAGE)


def test_a_queue_of_a_feature_nobody_accepted(rig: BalloonRig) -> None:
    rig.driver.negotiate(1 << 32)
    for index in range(3):
        rig.driver.setup_queue(index)
    rig.regs.status = 3 | FEATURES_OK | DRIVER_OK
    rig.until_broken()


def test_outside_a_machine() -> None:
    lone = Balloon(8 << 20)
    assert lone.target == 8 << 20
    for use in (lone.stats, lone.counts, lone.start_hints, lambda: lone.poll_stats(1)):
        with pytest.raises(VmmError, match="not part of a running machine"):
            use()
    lone.close()
    with pytest.raises(ConfigError, match="16 TiB"):
        Balloon(1 << 45)

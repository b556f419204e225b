"""RISC-V's PLIC: claims, completions, priorities, contexts, levels; and whatever a guest writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm._native import ffi, lib
from vmm.devices.plic import Plic
from vmm.errors import ConfigError
from vmm.irq import IrqChip, IrqLine

PENDING, ENABLE, CONTEXT = 0x1000, 0x2000, 0x20_0000


class Rig:
    """A PLIC and what its outputs say."""

    def __init__(self, sources: int = 40, contexts: int = 2) -> None:
        self.lines: list[IrqLine] = [IrqChip().line(i) for i in range(contexts)]
        self.plic = Plic(sources, self.lines)

    def priority(self, source: int, value: int) -> None:
        self.plic.write(4 * source, 4, value)

    def enable(self, context: int, *sources: int) -> None:
        for word in range(32):
            bits = sum(1 << s % 32 for s in sources if s // 32 == word)
            self.plic.write(ENABLE + 0x80 * context + 4 * word, 4, bits)

    def threshold(self, context: int, value: int) -> None:
        self.plic.write(CONTEXT + 0x1000 * context, 4, value)

    def claim(self, context: int) -> int:
        return self.plic.read(CONTEXT + 0x1000 * context + 4, 4)

    def complete(self, context: int, source: int) -> None:
        self.plic.write(CONTEXT + 0x1000 * context + 4, 4, source)

    def pending(self, source: int) -> bool:
        return bool(self.plic.read(PENDING + source // 32 * 4, 4) >> source % 32 & 1)

    @property
    def levels(self) -> list[bool]:
        return [line.level for line in self.lines]

    def close(self) -> None:
        self.plic.close()
        for line in self.lines:
            line.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def test_one_interrupt_from_its_line_to_its_completion(rig: Rig) -> None:
    rig.priority(33, 1)
    rig.enable(0, 33)
    rig.plic.set(33, True)
    assert rig.levels == [True, False]
    assert rig.pending(33)
    assert rig.claim(0) == 33
    assert rig.levels == [False, False]
    assert not rig.pending(33)
    assert rig.claim(0) == 0
    rig.plic.set(33, False)
    rig.complete(0, 33)
    assert rig.levels == [False, False]


def test_a_line_that_stays_up_interrupts_again_after_completion_and_not_before(rig: Rig) -> None:
    rig.priority(5, 3)
    rig.enable(0, 5)
    rig.plic.set(5, True)
    assert rig.claim(0) == 5
    rig.plic.set(5, True)
    assert (rig.claim(0), rig.levels[0]) == (0, False)
    rig.complete(0, 5)
    assert rig.levels[0]
    assert rig.claim(0) == 5


def test_a_request_stays_when_its_line_falls(rig: Rig) -> None:
    rig.priority(5, 3)
    rig.enable(0, 5)
    rig.plic.set(5, True)
    rig.plic.set(5, False)
    assert rig.pending(5)
    assert rig.claim(0) == 5
    rig.complete(0, 5)
    assert (rig.claim(0), rig.levels[0]) == (0, False)


def test_a_line_that_rose_while_it_was_served_is_not_lost(rig: Rig) -> None:
    rig.priority(5, 3)
    rig.enable(0, 5)
    rig.plic.set(5, True)
    assert rig.claim(0) == 5
    rig.plic.set(5, False)
    rig.plic.set(5, True)
    rig.complete(0, 5)
    assert rig.claim(0) == 5


def test_the_highest_priority_first_and_the_lowest_number_among_equals(rig: Rig) -> None:
    rig.enable(0, *range(1, 41))
    for source, priority in ((40, 7), (2, 1), (35, 4), (9, 4), (8, 0)):
        rig.priority(source, priority)
        rig.plic.set(source, True)
    assert [rig.claim(0) for _ in range(5)] == [40, 9, 35, 2, 0]


def test_the_threshold_masks_the_line_and_not_the_claim(rig: Rig) -> None:
    rig.priority(1, 3)
    rig.enable(0, 1)
    rig.enable(1, 1)
    rig.threshold(0, 3)
    rig.threshold(1, 2)
    rig.plic.set(1, True)
    assert rig.levels == [False, True]
    rig.threshold(0, 2)
    assert rig.levels == [True, True]
    rig.threshold(0, 7)
    assert rig.claim(0) == 1
    assert rig.levels == [False, False]


def test_contexts_share_a_source_and_one_of_them_gets_it(rig: Rig) -> None:
    rig.priority(7, 1)
    rig.enable(0, 7)
    rig.enable(1, 7)
    rig.plic.set(7, True)
    assert rig.levels == [True, True]
    assert rig.claim(1) == 7
    assert rig.claim(0) == 0
    assert rig.levels == [False, False]
    rig.complete(0, 7)  # whoever enables it may complete it
    assert rig.levels == [True, True]


def test_what_is_not_enabled_is_neither_claimed_nor_completed(rig: Rig) -> None:
    rig.priority(7, 1)
    rig.enable(0, 7)
    rig.plic.set(7, True)
    assert rig.claim(1) == 0
    assert rig.claim(0) == 7
    rig.enable(0)
    rig.complete(0, 7)
    rig.complete(1, 7)
    rig.enable(0, 7)
    assert rig.levels[0] is False  # its completion never came
    rig.complete(0, 7)
    assert rig.levels[0]


def test_registers_keep_what_they_have_bits_for(rig: Rig) -> None:
    ones = 0xFFFF_FFFF
    for offset, kept in (
        (0, 0),  # there is no source 0
        (4, 7),
        (4 * 40, 7),
        (4 * 41, 0),  # nor 41
        (PENDING, 0),
        (ENABLE, ones - 1),
        (ENABLE + 4, 0x1FF),
        (ENABLE + 8, 0),
        (ENABLE + 0x80, ones - 1),
        (ENABLE + 0x100, 0),  # nor a third context
        (CONTEXT, 7),
        (CONTEXT + 0x1000, 7),
        (CONTEXT + 0x2000, 0),
        (CONTEXT + 8, 0),
        (CONTEXT - 4, 0),
        (Plic.SIZE - 4, 0),
    ):
        rig.plic.write(offset, 4, ones)
        assert rig.plic.read(offset, 4) == kept, hex(offset)


@pytest.mark.parametrize(("offset", "size"), [(4, 1), (4, 2), (4, 8), (6, 4), (CONTEXT + 4, 8)])
def test_other_widths_are_nothing(rig: Rig, offset: int, size: int) -> None:
    rig.priority(1, 5)
    rig.enable(0, 1)
    rig.plic.set(1, True)
    rig.plic.write(offset, size, 0)
    assert rig.plic.read(offset, size) == 0
    assert rig.plic.read(4, 4) == 5
    assert rig.pending(1)


def test_reset_forgets_all_but_the_lines(rig: Rig) -> None:
    for source in (1, 2):
        rig.priority(source, 1)
        rig.plic.set(source, True)
    rig.enable(0, 1, 2)
    assert rig.claim(0) == 1
    rig.plic.set(2, False)
    rig.plic.reset()
    assert rig.levels == [False, False]
    assert [rig.plic.read(4 * s, 4) for s in (1, 2)] == [0, 0]
    assert (rig.pending(1), rig.pending(2)) == (True, False)
    rig.priority(1, 1)
    rig.enable(0, 1)
    assert rig.claim(0) == 1


def test_how_many_there_may_be() -> None:
    for sources, contexts, words in (
        (0, 1, "1 to 1023 sources, not 0"),
        (1024, 1, "not 1024"),
        (1, 0, "1 to 1024 contexts, not 0"),
        (1, 1025, "--cpus"),
    ):
        with pytest.raises(ConfigError, match=words):
            Plic(sources, [None] * contexts)
    most = Plic(1023, [None] * 1024)
    most.write(4 * 1023, 4, 1)
    most.write(ENABLE + 0x80 * 1023 + 0x7C, 4, 1 << 31)
    most.set(1023, True)
    assert most.read(CONTEXT + 0x1000 * 1023 + 4, 4) == 1023
    for source in (0, 1024, 1 << 31):
        with pytest.raises(ValueError, match="no source"):
            most.set(source, True)
    most.close()
    assert lib.vmm_plic_create(0, 1, ffi.new("struct vmm_irq *[1]")) == ffi.NULL


class Model:
    """The same in the plainest words."""

    def __init__(self, sources: int, contexts: int) -> None:
        self.sources = range(1, sources + 1)
        self.level = dict.fromkeys(self.sources, False)
        self.waits = dict.fromkeys(self.sources, False)  # for completion
        self.pending: set[int] = set()
        self.priority = dict.fromkeys(self.sources, 0)
        self.enabled: list[set[int]] = [set() for _ in range(contexts)]
        self.threshold = [0] * contexts

    def set(self, source: int, level: bool) -> None:
        self.level[source] = level
        if level and not self.waits[source]:
            self.pending.add(source)

    def best(self, context: int) -> int:
        able = [s for s in self.pending & self.enabled[context] if self.priority[s]]
        return min(able, key=lambda s: (-self.priority[s], s), default=0)

    def claim(self, context: int) -> int:
        found = self.best(context)
        if found:
            self.pending.remove(found)
            self.waits[found] = True
        return found

    def complete(self, context: int, source: int) -> None:
        if source in self.enabled[context]:
            self.waits[source] = False
            self.set(source, self.level[source])

    def output(self, context: int) -> bool:
        best = self.best(context)
        return best != 0 and self.priority[best] > self.threshold[context]


source = st.integers(1, 40)
context = st.integers(0, 1)
steps = st.one_of(
    st.tuples(st.just("set"), source, st.booleans()),
    st.tuples(st.just("priority"), source, st.integers(0, 7)),
    st.tuples(st.just("enable"), context, st.sets(source)),
    st.tuples(st.just("threshold"), context, st.integers(0, 7)),
    st.tuples(st.just("claim"), context, st.none()),
    st.tuples(st.just("complete"), context, source),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, max_size=60))
def test_it_is_what_the_model_is(todo: list[tuple[str, int, object]]) -> None:
    rig, model = Rig(), Model(40, 2)
    for what, a, b in todo:
        if what == "set":
            rig.plic.set(a, bool(b))
            model.set(a, bool(b))
        elif what == "priority":
            assert isinstance(b, int)
            rig.priority(a, b)
            model.priority[a] = b
        elif what == "enable":
            assert isinstance(b, set)
            rig.enable(a, *b)
            model.enabled[a] = b
        elif what == "threshold":
            assert isinstance(b, int)
            rig.threshold(a, b)
            model.threshold[a] = b
        elif what == "claim":
            assert rig.claim(a) == model.claim(a)
        else:
            assert isinstance(b, int)
            rig.complete(a, b)
            model.complete(a, b)
        assert rig.levels == [model.output(0), model.output(1)]
        assert {s for s in model.sources if rig.pending(s)} == model.pending
    rig.close()


accesses = st.tuples(
    st.one_of(
        st.integers(0, Plic.SIZE - 8),
        st.sampled_from([0, 4, PENDING, PENDING + 4, ENABLE, ENABLE + 4, CONTEXT, CONTEXT + 4]),
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(accesses, max_size=40))
def test_whatever_a_guest_writes(todo: list[tuple[int, int, int | None]]) -> None:
    rig = Rig()
    for s in range(1, 41):
        rig.plic.set(s, True)
    for offset, size, value in todo:
        if value is None:
            assert 0 <= rig.plic.read(offset, size) < 1 << 8 * size
        else:
            rig.plic.write(offset, size, value & (1 << 8 * size) - 1)
        assert not rig.pending(0)
    rig.close()


def test_sources_and_harts_at_once(rig: Rig) -> None:
    """Every rise is taken by one hart, whichever thread drove it."""
    for s in range(1, 41):
        rig.priority(s, 1)
    rig.enable(0, *range(1, 41))
    rig.enable(1, *range(1, 41))
    taken: list[list[int]] = [[], []]
    done = threading.Event()

    def hart(nr: int) -> None:
        while True:
            last = done.is_set()
            found = rig.claim(nr)
            if found:
                taken[nr].append(found)
                rig.plic.set(found, False)
                rig.complete(nr, found)
            elif last:
                return

    harts = [threading.Thread(target=hart, args=(nr,)) for nr in (0, 1)]
    for thread in harts:
        thread.start()
    for s in range(1, 41):
        rig.plic.set(s, True)
    done.set()
    for thread in harts:
        thread.join()
    assert sorted(taken[0] + taken[1]) == list(range(1, 41))
    assert rig.levels == [False, False]

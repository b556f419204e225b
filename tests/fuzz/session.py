"""One session: a queue is set up, asked some things that make sense and, mostly, one that does
not, and reset. All of it follows from a seed.

What must happen is foretold by the Python twin of the ring, which pops from the same memory before
the device is told of it:
- the device breaks the queue where the twin does, for the same reason (or before that because a
  request makes no sense to it: 'request');
- otherwise every chain of a queue that answers by itself comes back, each as often as it was
  offered, with no more written than it has room;
- no byte of guest memory changes that the device was not given;
- after the reset another driver finds it in working order, which is what the next session sees.
"""

from __future__ import annotations

import struct
import time
from random import Random
from typing import Any

from tests.fuzz.dice import Finding
from tests.fuzz.executor import HIGH, Executor
from tests.fuzz.targets import Target
from tests.virtio_mock import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, VERSION_1
from tests.virtio_mutations import MUTATIONS, Layout
from tests.virtio_ring import EVENT_IDX, INDIRECT, PACKED, RINGS, DriverRing, PackedRing
from vmm.devices.virtio.packed import PackedQueue
from vmm.devices.virtio.queue import Chain, Queue
from vmm.devices.virtio.split import SplitQueue

BASE, TABLES, BUFFERS, END = 0x1000, 0x4000, 0x6000, 0x1_8000
OTHERS = 0x2_0000
HIGH_USED = 1 << 16  # half of it for buffers
IN_ORDER, RING_RESET = 1 << 35, 1 << 40
#: The device may fill the ring itself then, and nothing can be said about what comes next.
WILD = {"addr_ring"}
NAMES = sorted(MUTATIONS)
SIZES = (2, 4, 8, 16, 16, 16)
ODD_SIZES = (3, 5, 7, 13)
PATIENCE_S = 5.0
RACE = 13  # of the 16 endings of a session
ZEROS = bytes(END)
#: Guest memory as it was before the device was told, by address. One session at a time.
KEPT = {0: bytearray(END), HIGH: bytearray(HIGH_USED)}


class Spy:
    """Guest memory, and what was read of it."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.contains = memory.contains
        self.reads: list[tuple[int, int]] = []

    def read(self, gpa: int, size: int) -> bytes:
        self.reads.append((gpa, size))
        return bytes(self._memory.read(gpa, size))

    def read_int(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.read(gpa, size), "little")


class Foretold:
    """What the twin takes: how the walk ends, the chains until then, and how many descriptors of
    the ring each of them takes."""

    def __init__(self, verdict: str, chains: list[Chain], taken: list[int]) -> None:
        self.verdict = verdict
        self.chains = chains
        self.taken = taken

    @property
    def broken(self) -> bool:
        return self.verdict not in ("empty", "chain")


def foretell(memory: Any, ring: DriverRing, twin: Queue, *, lazy: bool = False) -> Foretold:
    """``lazy``: of a device that gives nothing back meanwhile."""
    q = twin_of(memory, ring, features_of(twin), twin.state)
    steps: dict[int, int] = getattr(q, "_taken", {})
    chains, taken = [], []
    while (chain := q.pop()) is not None:
        chains.append(chain)
        taken.append(steps.get(chain.head, 1))
        if not lazy:
            del q._inflight[chain.head]
            steps.pop(chain.head, None)
        if len(chains) > 70000:
            raise Finding("the twin does not come to an end")
    return Foretold(q.verdict, chains, taken)


def twin_of(memory: Any, ring: DriverRing, features: int, at: tuple[int, int]) -> Queue:
    kind = PackedQueue if features & PACKED else SplitQueue
    return kind(memory, ring.size, ring.desc, ring.avail, ring.used, features, at)


def features_of(q: Queue) -> int:
    packed = PACKED if hasattr(q, "_taken") else 0
    return packed | (INDIRECT if q._indirect else 0) | (EVENT_IDX if q._event_idx else 0)


class Session:
    """``log`` says what was done, for whoever reads of a finding."""

    def __init__(self, executor: Executor, target: Target, r: Random) -> None:
        self.executor = executor
        self.memory = executor.memory
        self.regs = executor.regs
        self.target = target
        self.r = r
        self.log: list[str] = []
        self.queue = r.randrange(len(executor.sizes))
        self.answers = self.queue in target.answers
        form = r.choice(sorted(RINGS))
        self.begin(form)

    # ---- the driver ------------------------------------------------------------------------

    def negotiate(self, form: str) -> int:
        r, regs = self.r, self.regs
        self.offered = offered = regs.features()
        features = offered & (r.getrandbits(64) | 0xFF << 28) if r.getrandbits(1) else offered
        features &= ~(PACKED | INDIRECT | EVENT_IDX)
        features |= VERSION_1 | RING_RESET & offered | RINGS[form].FEATURES
        features |= r.choice((0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX))
        regs.accept(features)
        regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        if not regs.status & FEATURES_OK:
            raise Finding(f"features {features:#x} of {offered:#x} were refused")
        return features

    def begin(self, form: str) -> None:
        r, regs = self.r, self.regs
        regs.status = 0
        if regs.status:
            raise Finding("the device does not reset")
        self.ending = r.randrange(16)
        # Most sessions take turns with the device; what comes of doing without is the others', and
        # those that race with it.
        self.executor.on_thread(self.ending == RACE or not r.getrandbits(3))
        regs.status = ACKNOWLEDGE | DRIVER
        self.features = self.negotiate(form)
        sizes = SIZES + ODD_SIZES if form == "packed" else SIZES
        size = min(r.choice(sizes), self.executor.sizes[self.queue])
        self.memory.write(0, ZEROS)
        self.memory.write(HIGH, ZEROS[: HIGH_USED // 2])
        self.ring = RINGS[form](self.memory, size, BASE)
        self.twin = self.new_twin()
        self.at, self.table, self.high = BUFFERS, TABLES, 0
        self.waiting: list[tuple[Chain, int]] = []
        self.breaks = self.executor.breaks(self.queue)
        if r.getrandbits(1):
            self.enable_others(form)
        self.enable()
        regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        if not regs.status & DRIVER_OK:
            raise Finding("the device does not start")
        self.log.append(f"queue {self.queue} {form} size={size} features={self.features:#x}")
        self.executor.settle()  # it looks once without being told
        # A queue of a feature that was not accepted is not the driver's to use.
        self.void = self.executor.broken()
        if self.void and not self.offered & ~self.features & ~(0x3 << 28 | PACKED):
            raise Finding("the device fails at once")

    def new_twin(self) -> Queue:
        return twin_of(self.memory, self.ring, self.features, self.ring.state)

    def enable(self) -> None:
        ring = self.ring
        self.regs.set_queue(self.queue, ring.size, ring.desc, ring.avail, ring.used)
        if not self.regs.enable(self.queue):
            raise Finding("a good queue was not enabled")

    def enable_others(self, form: str) -> None:
        """Empty ones."""
        for queue in range(len(self.executor.sizes)):
            if queue != self.queue:
                base = OTHERS + 0x400 * queue
                other = RINGS[form](self.memory, min(8, self.executor.sizes[queue]), base)
                self.regs.set_queue(queue, other.size, other.desc, other.avail, other.used)
                self.regs.enable(queue)

    # ---- requests ----------------------------------------------------------------------------

    def place(self, size: int) -> int:
        """Where a buffer goes."""
        if self.r.getrandbits(3) == 0 and self.high + size < HIGH_USED // 2:
            high = HIGH + self.high
            self.high += size + self.r.randrange(4)
            return high
        at = self.at
        self.at += size + self.r.randrange(4)
        return at

    def cut(self, size: int, most: int) -> list[int]:
        """A length in pieces, as a driver may cut it."""
        r = self.r
        if size < 2 or r.getrandbits(1):
            return [size] if size else []
        ends = sorted({r.randrange(1, size) for _ in range(r.randrange(1, most))} | {size})
        return [b - a for a, b in zip([0, *ends], ends, strict=False)]

    def chain(self, lay: Layout) -> bool:
        """Offer one request; False when there is no room for more."""
        sent, room = self.target.request(self.queue, self.r)
        readable, writable = self.cut(len(sent), 4), self.cut(room, 3)
        count = len(readable) + len(writable)
        indirect = self.table if self.features & INDIRECT and self.r.getrandbits(1) else None
        if not 0 < count <= self.ring.size or self.at + len(sent) + room + 99 > END:
            return False
        if (1 if indirect else count) > len(self.ring.free) or self.table + 16 * count > BUFFERS:
            return False
        if indirect is not None:
            self.table += 16 * count
        parts = []
        for size in readable:
            parts.append((self.place(size), size))
            self.memory.write(parts[-1][0], sent[:size])
            sent = sent[size:]
        lay.chain(parts, [(self.place(size), size) for size in writable], indirect=indirect)
        return True

    # ---- cases ----------------------------------------------------------------------------------

    def run(self) -> int:
        """How many cases that were."""
        r = self.r
        if self.void:
            self.end()
            return 1
        for nr in range(1 + r.randrange(4)):
            if not self.good_case():
                return nr + 1
        ending = self.ending
        if ending < 12:
            self.bad_case()
        elif ending == 12:
            self.good_case(wait=False)  # a reset finds it in flight
        elif ending == RACE:
            self.racing_case()
        elif ending == 14:
            self.frozen()
            self.good_case()
        elif self.features & RING_RESET:
            self.good_case(wait=False)
            self.executor.settle()
            if not self.executor.broken():
                self.reset_queue()
                self.good_case()
        self.end()
        return nr + 2

    def offer(self) -> Layout:
        lay = Layout(self.ring)
        for _ in range(1 + self.r.randrange(3)):
            if not self.chain(lay):
                break
        return lay

    def good_case(self, *, wait: bool = True) -> bool:
        """Requests as a driver makes them; False when the session is over."""
        self.log.append("requests")
        if not self.waiting:
            self.at, self.table, self.high = BUFFERS, TABLES, 0
        if not self.offer().heads:
            return True
        told = foretell(self.memory, self.ring, self.twin)
        if told.broken:
            raise Finding(f"the twin refuses what is right: {told.verdict}")
        self.waiting += zip(told.chains, told.taken, strict=True)
        if not wait:
            self.regs.notify(self.queue)
            return True
        if self.judge(told, told, good=True):
            return False
        for head, _ in self.ring.reap():
            self.waiting = [w for w in self.waiting if w[0].head != head]
        self.twin = self.new_twin()
        # If it holds them, where its walk stands is not known.
        return self.answers or not self.waiting

    def bad_case(self) -> None:
        lay = self.offer()
        if not lay.heads:
            return
        wild = False
        for _ in range(self.r.choice((1, 1, 1, 2, 3))):
            name, which, n = self.r.choice(NAMES), self.r.randrange(60), self.r.randrange(1 << 16)
            self.log.append(f"{name} {which} {n}")
            lay.mutate(name, which, n)
            wild |= name in WILD
        spy = Spy(self.memory)
        told = foretell(spy, self.ring, self.twin)
        lazy = foretell(self.memory, self.ring, self.twin, lazy=True)
        self.waiting += zip(told.chains, told.taken, strict=True)
        wild |= overlap(told.chains, spy.reads) or self.reads_used(spy.reads)
        if wild or self.target.discards:
            self.regs.notify(self.queue)
            self.executor.settle()
            return
        self.judge(told, lazy)

    def reads_used(self, reads: list[tuple[int, int]]) -> bool:
        """Whether the walk went round a packed ring, to descriptors used by then."""
        seen = [at for at, size in reads if size == 8 and (at - self.ring.desc) % 16 == 8]
        return len(seen) > len(set(seen)) and isinstance(self.ring, PackedRing)

    def racing_case(self) -> None:
        """The driver changes its mind while the device looks."""
        lay = self.offer()
        self.regs.notify(self.queue)
        for _ in range(8):
            lay.mutate(self.r.choice(NAMES), self.r.randrange(60), self.r.randrange(1 << 16))
            if self.r.getrandbits(1):
                self.regs.notify(self.queue)
        self.executor.settle()

    def frozen(self) -> None:
        """What is written to a queue's registers once it is enabled changes nothing."""
        for value in (0, 1, 3, 0xFFFF):
            self.regs.set_queue(self.queue, value, value << 4, value << 2, value << 2)
        self.log.append("registers")

    def reset_queue(self) -> None:
        if not self.regs.reset_queue(self.queue):
            raise Finding("a queue does not reset")
        self.log.append("queue reset")
        self.waiting = []
        self.ring = type(self.ring)(self.memory, self.ring.size, BASE)
        self.twin = self.new_twin()
        self.enable()
        self.executor.settle()

    def end(self) -> None:
        self.regs.status = 0
        if self.regs.status:
            raise Finding("the device does not reset")
        if self.target.after is not None:
            self.target.after(getattr(self.executor, "device"))  # noqa: B009

    # ---- judgement ------------------------------------------------------------------------------

    def judge(self, told: Foretold, lazy: Foretold, *, good: bool = False) -> bool:
        """Let the device go, and compare. True when the queue is broken. ``lazy`` differs from
        ``told`` where it matters how fast a device is; ``good``: no buffers overlap."""
        self.keep()
        clear = (told.verdict, len(told.chains)) == (lazy.verdict, len(lazy.chains))
        self.regs.notify(self.queue)
        broken = self.wait(told, clear)
        if broken:
            self.check_verdict(told, lazy)
            self.regs.status = 0  # nothing is in flight from here on
        answers = self.check_answers()
        if not self.target.discards:
            if good:
                self.check_rest(answers)
            self.check_memory()
        return broken

    def keep(self) -> None:
        for start, old in KEPT.items():
            memoryview(old)[:] = self.memory.view(start, len(old))

    def wait(self, told: Foretold, clear: bool) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        rounds = 0
        self.executor.settle()
        while True:
            if self.executor.broken():
                return True
            rounds += 1
            sure = self.answers and clear
            if sure and not told.broken and len(self.answered()) >= len(told.chains):
                return False
            if not sure and rounds >= 2:
                return False
            if time.monotonic() > deadline:
                want = told.verdict if told.broken else f"{len(told.chains)} answers"
                got = len(self.answered())
                raise Finding(f"{want} foretold, and {got} answers came in {PATIENCE_S} s")
            if sure:
                self.executor.rest()
            else:
                self.executor.settle()

    def check_verdict(self, told: Foretold, lazy: Foretold) -> None:
        now = self.executor.breaks(self.queue)
        if now is None or self.breaks is None:
            return
        if now[0] != self.breaks[0] + 1:
            raise Finding(f"the queue was broken {now[0] - self.breaks[0]} times")
        possible = {told.verdict, lazy.verdict, "request"}
        if now[1] not in possible:
            raise Finding(f"{now[1]} where {sorted(possible)} was foretold")

    def answered(self) -> list[tuple[int, int]]:
        """(head, length) of what came back, by the walk that was foretold."""
        ring = self.ring
        if not isinstance(ring, PackedRing):
            count = (self.memory.read_int(ring.used + 2, 2) - ring.used_idx) & 0xFFFF
            if count > len(self.waiting):
                raise Finding(f"{count} answers to {len(self.waiting)} chains")
            places = [ring.used + 4 + 8 * ((ring.used_idx + i) % ring.size) for i in range(count)]
            return [struct.unpack("<II", self.memory.read(at, 8)) for at in places]
        steps: dict[int, list[int]] = {}
        for chain, taken in self.waiting:
            steps.setdefault(chain.head, []).append(taken)
        found: list[tuple[int, int]] = []
        at, wrap = ring.used_pos, ring.used_wrap
        while len(found) < len(self.waiting):
            rest = self.memory.read(ring.desc + 16 * at + 8, 8)
            length, ident, flags = struct.unpack("<IHH", rest)
            if flags & 0x8080 != (0x8080 if wrap else 0):
                break
            found.append((ident, length))
            at += steps[ident].pop(0) if steps.get(ident) else 1
            if at >= ring.size:
                at, wrap = at - ring.size, not wrap
        return found

    def check_answers(self) -> list[tuple[int, int]]:
        rooms: dict[int, list[int]] = {}
        for chain, _ in self.waiting:
            rooms.setdefault(chain.head, []).append(chain.write_len)
        answers = self.answered()
        order = [chain.head for chain, _ in self.waiting[: len(answers)]]
        if self.features & IN_ORDER and [head for head, _ in answers] != order:
            raise Finding(f"IN_ORDER, and {answers} came of {order}")
        for head, length in answers:
            if not rooms.get(head):
                raise Finding(f"head {head} was answered too often, or was never offered")
            room = rooms[head].pop(0)  # the second is not taken before the first is back
            if length > room:
                raise Finding(f"{length} bytes used of {room}")
        return answers

    def check_rest(self, answers: list[tuple[int, int]]) -> None:
        """What used.len does not count is as it was, but for a status byte at the end."""
        chains = {chain.head: chain for chain, _ in self.waiting}
        for head, length in answers:
            offset = -length
            for nr, (gpa, size) in enumerate(chains[head].writable, 1):
                start, offset = max(0, -offset), offset + size
                end = size - int(self.target.status and nr == len(chains[head].writable))
                base = HIGH if gpa >= HIGH else 0
                old = KEPT[base][gpa - base + start : gpa - base + end]
                if start < end and self.memory.read(gpa + start, end - start) != old:
                    raise Finding(f"more than {length} bytes were written, at {gpa:#x}")

    def check_memory(self) -> None:
        """Nothing changed but what the device may write of the queue, and what was writable."""
        allowed = self.ring.device_writes
        allowed += [part for chain, _ in self.waiting for part in chain.writable]
        for start, old in KEPT.items():
            now, view = self.memory.view(start, len(old)), memoryview(old)
            for gpa, size in allowed:
                at = gpa - start
                if 0 <= at < len(old):
                    view[at : at + size] = now[at : at + size]
            if old != now:
                wrong = next(i for i, (a, b) in enumerate(zip(now, old, strict=True)) if a != b)
                raise Finding(f"the device wrote at {start + wrong:#x}, which it was not given")


def overlap(chains: list[Chain], reads: list[tuple[int, int]]) -> bool:
    """Whether a buffer to be written is also a descriptor that the walk read."""
    for chain in chains:
        for gpa, size in chain.writable:
            if any(at < gpa + size and gpa < at + n for at, n in reads):
                return True
    return False

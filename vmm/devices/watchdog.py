"""The watchdog of Intel's 6300ESB, which Linux drives with i6300esb. Intel 300641-004 §16.

Two stages: when the first has run out the guest may be interrupted, when the second has, the
machine does what ``action`` says. Either is (preload << 15) or, with the fast clock, (preload << 5)
ticks of a 33 MHz clock long: about 1 ms or 1 µs for each unit. Time in which the machine is paused,
or in which the host does not let vmm run, does not count.

Memory (BAR 0), 32 bits each: 0x0 and 0x4 the preloads, 20 bits, 0x8 interrupt status, 0xc reload. A
preload or the reload register takes a write only after 0x80 and 0x86 were written to 0xc.
Configuration space: 0x60 what runs out, 0x68 what is on.
"""

from __future__ import annotations

import threading
import time

from vmm.devices.pci import COMMAND, COMMAND_INTX_DISABLE, PciDevice
from vmm.options import Field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from vmm.board import Board
    from vmm.options import Options

_CLOCK_HZ = 33_000_000
_PRELOAD_MAX = 0xF_FFFF

PRELOAD1, PRELOAD2, INTERRUPT, RELOAD = 0x0, 0x4, 0x8, 0xC
_UNLOCK = (0x80, 0x86)
_RELOAD_PING = 1 << 8
_RELOAD_TIMEOUT = 1 << 9  # it ran out since this was written

CONFIG = 0x60
_CONFIG_NO_OUTPUT = 1 << 5
_CONFIG_FAST = 1 << 2
_CONFIG_INT = 3  # of the first stage: 0 an interrupt, 2 an SMI, 3 nothing
_CONFIG_INT_IRQ = 0
LOCK = 0x68
_LOCK_LOCKED, _LOCK_ENABLE, _LOCK_FREE_RUN = 1, 2, 4

#: The clock is looked at so often at least, in seconds; a look that comes later than that by
#: STALL_S was held up, and so was the guest: that wait does not count.
STEP_S = 1.0
STALL_S = 0.5
#: Free running, no more than so often: the guest must not keep a thread of the host busy.
FREE_RUN_MIN_S = 0.01


class Watchdog(PciDevice):
    """The watchdog. Counts down on a Python thread, which is there from the first start on."""

    HELP = (
        "A watchdog (Linux: i6300esb, /dev/watchdog). A guest that started it and does not feed it "
        "in time has failed, unless action says otherwise."
    )
    OPTIONS = (
        Field(
            "action",
            "reset: the run ends with status 255; poweroff: it ends with 0; pause: the vCPUs are "
            "held, for whoever looks; none: it is counted",
            choices=("reset", "poweroff", "pause", "none"),
            default="reset",
            first=True,
        ),
    )

    def __init__(self, action: str = "reset", *, clock: Callable[[], float] | None = None) -> None:
        """``clock``: seconds, instead of the host's; ``advance`` is the caller's then."""
        super().__init__("watchdog0", 0x8086, 0x25AB, 0x08_8000, intx=True)
        self.action = action
        #: How often it ran out.
        self.fired = 0
        #: How often the guest started it, and fed it.
        self.starts = self.pings = 0
        self._clock = clock or time.monotonic
        self._own_clock = clock is not None
        self._board: Board | None = None
        self._thread: threading.Thread | None = None
        #: Guards what follows; notified when the deadline moves or the device is closed.
        self._lock = threading.Condition()
        self._closed = False
        self._power_on()
        self._put(CONFIG, 0, 2)
        self._allow(CONFIG, _CONFIG_NO_OUTPUT | _CONFIG_FAST | _CONFIG_INT, 2)
        self.watch(CONFIG, 0xFFFF, 2)
        self._allow(LOCK, _LOCK_LOCKED | _LOCK_ENABLE | _LOCK_FREE_RUN, 1)
        self.watch(LOCK, 0xFF, 1)
        self.add_bar(0, 16, self)

    def _power_on(self) -> None:
        self._preload = [_PRELOAD_MAX, _PRELOAD_MAX]
        self._unlocked = 0
        self._stage = 1
        self._deadline: float | None = None
        self._config = 0
        self._on = 0
        self._ran_out = False
        self._interrupt = False

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(options.action)

    def plug(self, board: Board) -> None:
        self._board = board
        super().plug(board)

    # ---- registers, on a vCPU thread ------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            value = {
                PRELOAD1: self._preload[0],
                PRELOAD2: self._preload[1],
                INTERRUPT: int(self._interrupt),
                RELOAD: _RELOAD_TIMEOUT if self._ran_out else 0,
            }[offset & 0xC]
        return value >> (8 * (offset & 3)) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        register = offset & 0xC
        value = value << (8 * (offset & 3)) & 0xFFFF_FFFF
        with self._lock:
            if register == INTERRUPT:
                self._interrupt = self._interrupt and not value & 1
                self._wire()
            elif register == RELOAD and value == _UNLOCK[0]:
                self._unlocked = 1
            elif register == RELOAD and value == _UNLOCK[1] and self._unlocked == 1:
                self._unlocked = 2
            else:
                if self._unlocked == 2:
                    self._write_unlocked(register, value)
                self._unlocked = 0

    def _write_unlocked(self, register: int, value: int) -> None:
        if register != RELOAD:
            # Loaded the next time its stage begins.
            self._preload[register // 4] = value & _PRELOAD_MAX
            return
        if value & _RELOAD_TIMEOUT:
            self._ran_out = False
        if value & _RELOAD_PING:
            self.pings += 1
            if self._on & _LOCK_ENABLE:
                self._begin()

    def config_written(self, reg: int, size: int) -> None:
        with self._lock:
            self._config = self.config_get(CONFIG, 2)
            wanted = self.config_get(LOCK, 1)
            if self._on & _LOCK_LOCKED:
                self._keep_lock(self._on)
            elif wanted != self._on:
                before, self._on = self._on, wanted
                if not wanted & _LOCK_ENABLE:
                    self._deadline = None
                elif not before & _LOCK_ENABLE:
                    self.starts += 1
                    self._begin()
            self._wire()

    def _keep_lock(self, value: int) -> None:
        from vmm._native import lib

        lib.vmm_pci_set(self._pci, self.slot, LOCK, 1, value)

    def _wire(self) -> None:
        if self.intx is not None:
            off = self.config_get(COMMAND, 2) & COMMAND_INTX_DISABLE
            self.intx.set(self._interrupt and not off)

    # ---- the countdown ---------------------------------------------------------------------------

    def _period(self, stage: int) -> float:
        """Seconds from the begin of a stage to its end."""
        shift = 5 if self._config & _CONFIG_FAST else 15
        return (max(1, self._preload[stage - 1]) << shift) / _CLOCK_HZ

    def _begin(self) -> None:
        """From the start; free running has the second stage only."""
        self._stage = 2 if self._on & _LOCK_FREE_RUN else 1
        before, self._deadline = self._deadline, self._clock() + self._period(self._stage)
        if self._thread is None and not self._own_clock:
            self._thread = threading.Thread(target=self._main, name=f"vmm-{self.name}", daemon=True)
            self._thread.start()
        if before is None or before > self._deadline:
            self._lock.notify_all()  # otherwise it looks again in time by itself

    def advance(self) -> None:
        """Do what is due by the clock."""
        out = False
        with self._lock:
            now = self._clock()
            while self._deadline is not None and now >= self._deadline:
                out = self._stage_ends() or out
        if out:
            self._run_out()

    def _stage_ends(self) -> bool:
        """Whether the watchdog ran out by it, with its output on."""
        assert self._deadline is not None
        if self._stage == 1:
            self._interrupt = self._config & _CONFIG_INT == _CONFIG_INT_IRQ
            self._wire()
            self._stage = 2
            self._deadline += self._period(2)
            return False
        self._ran_out = True
        # The real one then waits for the reset it asked for; ours goes on with the next ping.
        self._deadline = None
        if self._on & _LOCK_FREE_RUN:
            self._deadline = self._clock() + max(FREE_RUN_MIN_S, self._period(2))
        return not self._config & _CONFIG_NO_OUTPUT

    def _run_out(self) -> None:
        self.fired += 1
        if self._board is None or self.action == "none":
            return
        if self.action == "pause":
            self._board.on_pause()
        elif self.action == "poweroff":
            self._board.on_end("poweroff", 0)
        else:
            self._board.on_end("watchdog", 255)

    def _main(self) -> None:
        try:
            while not self._closed:
                self.advance()
                with self._lock:
                    self._wait()
        except BaseException as e:
            if self._board is not None:
                self._board.on_error(e)

    def _wait(self) -> None:
        """Until something may be due. What passed while nobody could run is added to the rest."""
        if self._closed:
            return
        if self._deadline is None:
            self._lock.wait()
            return
        before, deadline = self._clock(), self._deadline
        step = min(deadline - before, STEP_S)
        if step > 0:
            self._lock.wait(step)
            if self._deadline == deadline:  # else it was fed, or switched, after that
                self._forgive(self._clock() - before, step)

    def _forgive(self, took: float, step: float) -> None:
        """A wait for ``step`` seconds took so many."""
        assert self._deadline is not None
        held = self._board is not None and self._board.paused()
        if held or took > step + STALL_S:
            self._deadline += took

    # ---- the end ---------------------------------------------------------------------------------

    def reset(self) -> None:
        with self._lock:
            self._power_on()
            self._wire()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        super().close()

    def faults(self) -> list[str]:
        if not self.fired:
            return []
        return [f"{self.name}: the guest did not feed it in time, {self.fired} times"]

    def unclaimed(self) -> str | None:
        if self.starts:
            return None
        return (
            f"the guest never started {self.name}; its kernel may lack CONFIG_I6300ESB_WDT, or "
            "nobody opened /dev/watchdog"
        )


DEVICE = Watchdog

"""The thread that raises a clock's interrupts."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import threading
    from collections.abc import Callable


class AlarmThread:
    """Calls ``fire`` when something is due; made once a guest has enabled an interrupt.

    ``fire`` raises what is due and says how many seconds until the next event, or None. It must
    not be possible for a guest to make that 0 over and over.
    """

    def __init__(self, name: str, fire: Callable[[], float | None]) -> None:
        import threading

        self._fire = fire
        self._changed = threading.Event()
        self._stopped = False
        self._thread: threading.Thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def kick(self) -> None:
        """What is due next may have changed. Any thread."""
        self._changed.set()

    def stop(self) -> None:
        self._stopped = True
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped:
            self._changed.clear()
            delay = self._fire()
            # A host clock that is set back must not make an alarm late by as much.
            self._changed.wait(None if delay is None else min(delay, 60.0))

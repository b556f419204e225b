"""How a run ended."""

from __future__ import annotations

from vmm.errors import CommandFailed, GuestLost, GuestPanic, GuestTimeout

#: Every ``RunResult.reason``.
REASONS = (
    "exited",  # a command in the guest ended; the status is its own
    "poweroff",  # the guest powered off
    "reset",  # the guest asked for a reset, which ends a run
    "debug-exit",  # the guest wrote its own status to the debug exit port
    "panic",  # the guest's kernel panicked
    "watchdog",  # the guest did not feed its watchdog
    "lost",  # it could not go on, or an exit that nobody handles
    "timeout",  # the deadline passed
    "stopped",  # Machine.stop() or SIGTERM
    "interrupted",  # Ctrl-C
)


class RunResult:
    """How a run ended.

    ``status`` is the exit status of ``vmm run`` (0 on a clean power-off), ``reason`` one of
    REASONS, ``console`` the tail of the main console, ``duration_s`` seconds from the start of
    the guest to its end, ``message`` one sentence, ``diagnosis`` many lines or empty, ``clocks``
    the measured times in seconds by name (``start_to_first_run_s`` and others). Of a command,
    ``stdout`` and ``stderr`` are what it wrote.
    """

    __slots__ = (
        "clocks", "console", "diagnosis", "duration_s", "message", "reason", "status", "stderr",
        "stdout",
    )  # fmt: skip

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        console: str = "",
        duration_s: float = 0.0,
        message: str = "",
        diagnosis: str = "",
        clocks: dict[str, float] | None = None,
        stdout: bytes = b"",
        stderr: bytes = b"",
    ) -> None:
        self.status = status
        self.reason = reason
        self.console = console
        self.duration_s = duration_s
        self.message = message
        self.diagnosis = diagnosis
        self.clocks = clocks if clocks is not None else {}
        self.stdout = stdout
        self.stderr = stderr

    @property
    def ok(self) -> bool:
        """Whether the guest ended by itself with status 0."""
        return self.status == 0

    def check(self) -> RunResult:
        """This result, unless the guest ended badly: then GuestPanic, GuestLost or
        GuestTimeout, with the console's tail in the exception's ``console``; or a command failed:
        then CommandFailed, with this result in it."""
        error = {
            "panic": GuestPanic,
            "lost": GuestLost,
            "watchdog": GuestLost,
            "timeout": GuestTimeout,
        }.get(self.reason)
        if error is not None:
            raise error(self.message or f"the guest ended by {self.reason}", console=self.console)
        if self.reason == "exited" and self.status:
            raise CommandFailed(self)
        return self

    def __repr__(self) -> str:
        return f"RunResult(status={self.status}, reason={self.reason!r}, message={self.message!r})"

"""One command for a guest that takes commands: the plan that starts it."""

from __future__ import annotations

import time

from vmm.errors import ConfigError
from vmm.guest.plan import Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vmm.guest.terminal import Terminal

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Command:
    """What to run and how.

    ``env`` is added to PATH, to TERM where there is a terminal, and to the HOME, USER, LOGNAME and
    SHELL of ``user`` (a name or number in the guest), which are all that a command is given.
    ``cwd`` must be there; None is ``place`` if the guest has it, else /.
    """

    __slots__ = ("argv", "cwd", "env", "place", "user")

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        place: str | None = None,
    ) -> None:
        if not argv or not argv[0]:
            raise ConfigError("There is no command to run in the guest.")
        self.argv = list(argv)
        self.env = dict(env or {})
        self.cwd = cwd
        self.user = user or "root"
        self.place = place

    def plan(self, terminal: Terminal, stdio: list[str], sent: int) -> Plan:
        """For one run on these streams; ``sent`` bytes of input were for earlier commands.

        Raises ConfigError for words with a NUL byte in them.
        """
        plan = Plan()
        # Its clock counts in seconds until it is told.
        plan.add("clock", *divmod(time.time_ns(), 1_000_000_000))
        plan.add("stdio", *stdio)
        plan.add("tty", *terminal.size(), "raw" if terminal.raw_output else "cooked")
        plan.add("input", sent)
        env = {"PATH": PATH, **self.env}
        if "tty" in stdio:
            env.setdefault("TERM", terminal.kind())
        try:
            plan.add("user", self.user)
            if self.cwd is not None:
                plan.add("cwd", self.cwd)
            else:
                plan.add("cwd", self.place or "/", "optional")
            plan.add("argv", *self.argv)
            plan.add("env", *(f"{key}={value}" for key, value in env.items()))
        except ValueError as error:
            raise ConfigError(f"The guest's command cannot be: {error}.") from None
        plan.add("run")
        return plan

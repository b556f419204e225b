"""A true /dev/kvm without hardware: what QEMU emulates carries a Linux with KVM in it.

``run`` boots that machine and runs one command in it, with this machine's files visible.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Options:
    """What ``vmm nested`` can be told.

    ``rw`` are directories the command may change; ``memory`` is in bytes and ``cpus`` a count
    (None: chosen from the host's); ``kernel`` an image or a directory with boot/ and
    lib/modules/; ``timeout`` in seconds; ``env`` holds ``KEY=VALUE`` or ``KEY`` (the caller's
    value) on top of the caller's environment; ``verbose`` shows the machine's log.
    """

    __slots__ = ("cpus", "env", "kernel", "memory", "rw", "timeout", "verbose")

    def __init__(
        self,
        *,
        rw: Sequence[str] = (),
        memory: int | None = None,
        cpus: int | None = None,
        kernel: str | None = None,
        timeout: float | None = None,
        env: Sequence[str] = (),
        verbose: bool = False,
    ) -> None:
        self.rw = list(rw)
        self.memory = memory
        self.cpus = cpus
        self.kernel = kernel
        self.timeout = timeout
        self.env = list(env)
        self.verbose = verbose


def run(argv: list[str], options: Options | None = None) -> int:
    """Run ``argv`` in a nested machine on this process's standard streams.

    Gives the command's exit status (128+n for a signal, 126/127 as a shell has them), or 124
    when ``options.timeout`` passed. The machine is gone when this returns, whatever happened.

    Raises:
        ConfigError: an option that cannot be.
        HostError: QEMU or a kernel is missing, or the machine failed; the end of its log has
            been printed on stderr.
    """
    from vmm.nested.appliance import run_command

    return run_command(argv, options or Options())


def usable_hint() -> str | None:
    """None when a nested machine can be started here; else one sentence on what is missing."""
    from vmm.errors import HostError
    from vmm.nested.machine import find_parts

    try:
        find_parts(None)
    except HostError as error:
        return str(error)
    return None

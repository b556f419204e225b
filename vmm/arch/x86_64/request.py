"""What to boot and how, while it is being loaded."""

from __future__ import annotations

from vmm.arch.x86_64 import layout
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.arch.source import Image, Source
    from vmm.arch.x86_64.state import BootState
    from vmm.memory import GuestMemory

#: COMMAND_LINE_SIZE of Linux on x86, less the NUL; and our own bound for what has none.
LINUX_CMDLINE_MAX = 2047
CMDLINE_MAX = 4095


class Request:
    """What to boot and how: the arguments of ``load_kernel``, and what is open meanwhile."""

    __slots__ = (
        "cache",
        "cmdline",
        "gigabyte_pages",
        "initrds",
        "memory",
        "opened",
        "protocol",
        "rsdp",
        "seed",
    )

    def __init__(
        self,
        memory: GuestMemory,
        initrds: Sequence[Image],
        cmdline: str,
        protocol: str,
        rsdp: int | None,
        seed: bytes,
        gigabyte_pages: bool,
        cache: bool,
    ) -> None:
        self.memory = memory
        self.initrds = initrds
        self.cmdline = cmdline
        self.protocol = protocol
        self.rsdp = rsdp or 0
        self.seed = seed
        self.gigabyte_pages = gigabyte_pages
        self.cache = cache
        self.opened: list[Source] = []

    def encoded_cmdline(self, limit: int) -> bytes:
        """The command line with its NUL. Raises ConfigError when it is longer than ``limit``."""
        try:
            data = self.cmdline.encode("ascii")
        except UnicodeEncodeError as e:
            raise ConfigError(
                f"the kernel command line has {self.cmdline[e.start]!r} at position {e.start}; "
                "only ASCII can be passed"
            ) from e
        if b"\0" in data:
            raise ConfigError(
                f"the kernel command line has a NUL at position {data.index(0)}, which ends it"
            )
        limit = min(limit, layout.CMDLINE_AREA - 1)
        if len(data) > limit:
            raise ConfigError(
                f"the kernel command line is {len(data)} bytes long and this kernel takes {limit}"
            )
        return data + b"\0"

    def finish(
        self, state: BootState, kind: str, description: str, kernel: tuple[int, int]
    ) -> BootState:
        state.kind = kind
        state.description = description
        state.kernel = kernel
        state.cmdline = self.cmdline
        state.e820 = layout.e820_table(self.memory)
        return state

"""Reading a Linux console like somebody who has seen many: what went wrong, and a guess why.

Only consulted after something happened; `re` is imported then.
"""

from __future__ import annotations

#: What a report can be, worst first.
KINDS = ("panic", "oops", "stall", "warning")

#: (kind, how its first line reads behind the timestamp, most lines it has).
_HEADS = (
    ("panic", r"Kernel panic - not syncing", 100),
    ("panic", r"VFS: (?:Cannot open root device|Unable to mount root)", 100),
    ("panic", r"PANIC: (?:double fault|early exception)", 60),
    ("warning", r"BUG: (?:sleeping function called|scheduling while atomic)", 60),
    ("stall", r"(?:watchdog: )?BUG: (?:soft lockup|workqueue lockup)", 60),
    ("stall", r"(?:NMI )?watchdog: Watchdog detected hard LOCKUP", 60),
    ("stall", r"rcu: INFO: .*(?:stall|self-detected)", 60),
    ("stall", r"INFO: rcu_\w+ (?:self-)?detected", 60),
    ("stall", r"INFO: task .* blocked for more than", 60),
    ("oops", r"BUG: |kernel BUG at |Oops: |Unable to handle kernel |Internal error: ", 100),
    ("oops", r"(?:general protection fault|divide error|invalid opcode|stack segment)[:,]", 100),
    ("warning", r"WARNING: (?:CPU: |at |possible |suspicious |inconsistent )", 60),
    ("warning", r"Out of memory: |oom-kill:", 1),
)
#: The last line of a report.
_END = r"---\[ end (?:trace|Kernel panic)"
_STALL_END = r" *</TASK>"
_CUT = r"-+\[ cut here \]-+"
#: Seconds since boot, and the task or CPU that some kernels add: "[    1.234567][  T1] ".
_STAMP = r"(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?"
_MAX_REPORTS = 32

#: (what the console says, what that means and what to do); the first that matches is the guess.
_HINTS = (
    (
        r"here are the available partitions:\s*(?:\S*\[.*?\] )?[0-9a-f]{4} +\d+ \S",
        "the kernel sees disks but not the one it was told to mount: check root= on the command "
        "line (/dev/vda is the first disk), and that the root's file system is built in",
    ),
    (
        r"Cannot open root device|Unable to mount root fs",
        "the kernel found no root file system and no disk: give it an initrd (-i), or a disk and "
        "root=/dev/vda with the drivers built in (CONFIG_VIRTIO_BLK, CONFIG_VIRTIO_PCI or "
        "CONFIG_VIRTIO_MMIO, and the file system's)",
    ),
    (
        r"ALERT!.* does not exist|Gave up waiting for root|Could not boot\."
        r"|Waiting for root device",
        "the root device did not appear: check root= on the command line (/dev/vda is the first "
        "disk), and that the initrd has the virtio drivers (CONFIG_VIRTIO_BLK, and "
        "CONFIG_VIRTIO_PCI or CONFIG_VIRTIO_MMIO)",
    ),
    (
        r"No working init found|Requested init \S+ failed|Failed to execute /\S+ \(error",
        "the kernel mounted its root but found no init it could run: the initrd or root file "
        "system needs an executable /init or /sbin/init of the guest's architecture; rdinit= or "
        "init= names another",
    ),
    (
        r"Attempted to kill init! exitcode=0x00000000",
        "the guest's init returned; process 1 must never exit, but power off instead",
    ),
    (
        r"Attempted to kill init! exitcode=0x00007[ef]00",
        "the guest's init ran a program that is missing, not executable, or lacks its libraries",
    ),
    (
        r"Attempted to kill init",
        "the guest's init died; the lines above the panic say how",
    ),
    (
        r"System is deadlocked on memory|Out of memory",
        "the guest ran out of memory: give it more (-m)",
    ),
    (
        r"[Ii]nitramfs unpacking failed|junk (?:in|within) compressed archive",
        "the initrd could not be unpacked: it is truncated, larger than the guest's memory (-m), "
        "or compressed in a way this kernel was not built for (CONFIG_RD_*)",
    ),
    (
        r"unable to open an initial console",
        "the guest's init has no console to print to: the initrd or root file system needs "
        "/dev/console, or the kernel CONFIG_DEVTMPFS_MOUNT",
    ),
)


class Report:
    """One problem on the console: ``kind`` (one of KINDS), ``title`` (its first line without
    timestamp), ``lines`` (from its head to its end, as printed)."""

    __slots__ = ("kind", "lines", "title")

    def __init__(self, kind: str, title: str, lines: list[str]) -> None:
        self.kind = kind
        self.title = title
        self.lines = lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def __repr__(self) -> str:
        return f"<{self.kind}: {self.title} ({len(self.lines)} lines)>"


def scan(text: str) -> list[Report]:
    """The reports in a console's text, in the order they begin; the first 32."""
    import re

    stamp = re.compile(_STAMP)
    heads = [(kind, re.compile(head), most) for kind, head, most in _HEADS]
    end, stall_end, cut = re.compile(_END), re.compile(_STALL_END), re.compile(_CUT)
    reports: list[Report] = []
    current: Report | None = None
    left, above = 0, ""
    for raw in text.split("\n"):
        raw = raw.rstrip("\r")
        line = stamp.sub("", raw, count=1) if raw[:1] in "[<" else raw
        kind, most = next(((k, n) for k, head, n in heads if head.match(line)), ("", 0))
        if kind and (current is None or KINDS.index(kind) < KINDS.index(current.kind)):
            if len(reports) == _MAX_REPORTS:
                break
            current = Report(kind, line, [above] if cut.search(above) else [])
            reports.append(current)
            left = most
        elif kind == "panic" and current is not None and line.startswith("Kernel panic"):
            current.title = line  # what VFS said before it belongs to it
        above = raw
        if current is None:
            continue
        current.lines.append(raw)
        left -= 1
        ends = end.match(line) or (current.kind == "stall" and stall_end.match(line))
        if not left or ends:
            current = None
    return reports


def worst(reports: list[Report]) -> Report | None:
    """The first report of the worst kind there is."""
    return min(reports, key=lambda r: KINDS.index(r.kind), default=None)


def guess(text: str) -> str | None:
    """Why the guest did not come up, in words, from all it printed; None without an idea."""
    import re

    return next((hint for pattern, hint in _HINTS if re.search(pattern, text)), None)

"""What guest memory costs this host."""

from __future__ import annotations

from pathlib import Path

from vmm.memory import RamRange


def resident(memory: list[RamRange]) -> int:
    """Bytes of this process's mappings of guest RAM that are in the host's memory."""
    ranges = [(r.hva, r.hva + r.size) for r in memory]
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, rest = line.partition(" ")
        if key.endswith(":"):
            if key == "Rss:" and counting:
                total += int(rest.split()[0]) * 1024
            continue
        start, _, end = key.partition("-")
        counting = any(int(start, 16) < high and int(end, 16) > low for low, high in ranges)
    return total

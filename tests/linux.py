"""Booting Debian's stock kernel in a test: what is booted, how long it may take, what it said."""

from __future__ import annotations

import os
from pathlib import Path

#: An emulated host on a loaded machine is slow; a quiet one takes 2 to 4 s a boot.
BOOT_TIMEOUT = 180.0


def can_boot_linux() -> bool:
    """A usable /dev/kvm on a CPU whose virtualization extension shows."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and ("vmx" in flags or "svm" in flags)

"""Where ``make`` looks for the guest's /init; it lives in vmm/guest/initbin.py."""

from __future__ import annotations

from vmm.guest.initbin import init_path

if __name__ == "__main__":
    init_path()

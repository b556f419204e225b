"""``vmm`` and ``python -m vmm``."""

from __future__ import annotations

import sys


def main() -> int:
    """The command line of this process. Returns its exit status."""
    try:
        from vmm.cli import main as dispatch

        return dispatch(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were being imported
        print("vmm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

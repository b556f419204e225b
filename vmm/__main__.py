"""``vmm`` and ``python -m vmm``."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    # The C half is all that is needed; the other one imports enum.
    import _signal as signal


def main() -> int:
    """The command line of this process. Returns its exit status."""
    # Until a machine is built there is nothing to undo, and Python may lose a KeyboardInterrupt
    # in the middle of an import: Ctrl-C simply ends the process.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vmm.cli import main as dispatch

    return dispatch(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

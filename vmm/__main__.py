"""``vmm`` and ``python -m vmm``."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    # The C half is all that is needed; the other one imports enum.
    import _signal as signal


def main() -> int:
    """The command line of this process. Returns its exit status."""
    _fill_standard_descriptors()
    # Until a machine is built there is nothing to undo, and Python may lose a KeyboardInterrupt
    # in the middle of an import: Ctrl-C simply ends the process.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vmm.cli import main as dispatch

    return dispatch(sys.argv[1:])


def _fill_standard_descriptors() -> None:
    """A closed stdin, stdout or stderr becomes /dev/null: else the next descriptor that is
    opened, an eventfd say, would be taken for it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one


if __name__ == "__main__":
    sys.exit(main())

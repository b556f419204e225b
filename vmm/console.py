"""Talking to the guest's console from Python: send, and expect an answer."""

from __future__ import annotations

from time import monotonic

from vmm.errors import GuestLost, GuestTimeout

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Callable
    from typing import Any, overload

    from vmm.chario import Input, Stream
else:

    def overload(f: Any) -> Any:
        return f


#: A wait in C is interrupted this often, so that Ctrl-C works.
_SLICE_MS = 100
#: A guest prints byte by byte: this long is waited for more before looking again.
_GATHER_S = 0.002
#: How much of the console an error message carries.
_TAIL = 4096
_TAIL_LINES = 20


class Console:
    """A guest's console: what it printed, and its keyboard. One thread at a time may ``expect``.

    Reading never takes anything away from the terminal or file the output also goes to.
    """

    def __init__(
        self,
        stream: Stream,
        inp: Input | None = None,
        ended: Callable[[], BaseException | None] | None = None,
    ) -> None:
        """``ended``: why nothing more will come, or None while the guest runs."""
        self.ended = ended
        self._stream = stream
        self._input = inp
        self._at = 0

    # ---- what was printed -------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Bytes the guest has printed."""
        return self._stream.total

    @property
    def data(self) -> bytes:
        """What is still kept of the output."""
        return self._stream.read(0)[1]

    @property
    def text(self) -> str:
        """What is still kept of the output, bytes that are no UTF-8 replaced."""
        return self.data.decode("utf-8", "replace")

    def tail(self, size: int = _TAIL) -> str:
        """The last ``size`` bytes, from the beginning of a line if there is one."""
        start, data = self._stream.read(max(0, self._stream.total - size), size)
        if start:
            line = data.find(b"\n") + 1
            data = data[line if line < len(data) else 0 :]
        return data.decode("utf-8", "replace")

    # ---- the keyboard -----------------------------------------------------------------------

    def send(self, data: str | bytes, *, timeout: float | None = 30.0) -> None:
        """Type ``data`` (a str as UTF-8), waiting while the guest's device is full.

        Raises GuestTimeout when it does not take it in time, and what `expect` raises when the
        guest has ended.
        """
        rest = data.encode() if isinstance(data, str) else bytes(data)
        if self._input is None:
            raise GuestLost("this console has no keyboard")
        deadline = None if timeout is None else monotonic() + timeout
        while rest:
            self._raise_if_ended()
            n = self._input.push(rest)
            rest = rest[n:]
            if rest and not self._input.wait(_slice_ms(deadline)) and _late(deadline):
                raise self._with_tail(
                    GuestTimeout(
                        f"the guest does not read its console: {len(rest)} bytes were not taken "
                        f"within {timeout:g} s"
                    )
                )

    def send_break(self) -> None:
        """A serial break; Linux takes the next character for SysRq."""
        if self._input is not None:
            self._input.send_break()

    # ---- expect -----------------------------------------------------------------------------

    @overload
    def expect(self, pattern: str | bytes, timeout: float | None = 30.0) -> bytes: ...
    @overload
    def expect(  # noqa: F811
        self, pattern: re.Pattern[str], timeout: float | None = 30.0
    ) -> re.Match[str]: ...
    @overload
    def expect(  # noqa: F811
        self, pattern: re.Pattern[bytes], timeout: float | None = 30.0
    ) -> re.Match[bytes]: ...
    def expect(self, pattern: Any, timeout: float | None = 30.0) -> Any:  # noqa: F811
        """Wait until the guest prints ``pattern``, and go on behind it next time.

        A str or bytes is looked for as it is and returned as bytes with everything before it;
        a compiled regular expression gives its match object. Raises GuestTimeout after
        ``timeout`` seconds (None: never), or what ended the guest; both carry the console's tail.
        """
        deadline = None if timeout is None else monotonic() + timeout
        finder = _finder(pattern)
        buffer, pause = bytearray(), _GATHER_S
        start = self._at
        while True:
            error = self._ending()  # before reading: what came up to the end still counts
            at, new = self._stream.read(start + len(buffer))
            if at > start + len(buffer):  # more than is kept was printed meanwhile
                buffer.clear()
                start = at
            seen = len(buffer)
            buffer += new
            extra = len(buffer) - self._stream.capacity
            if extra > 0:
                del buffer[:extra]
                start, seen = start + extra, max(0, seen - extra)
            began = monotonic()
            hit = finder(buffer, seen) if new or not seen else None
            if hit is not None:
                result, end = hit
                self._at = start + end
                return result
            if error is not None:
                raise self._with_tail(error, f"while waiting for {_name(pattern)} on the console")
            if _late(deadline):
                raise self._with_tail(
                    GuestTimeout(f"the guest did not print {_name(pattern)} within {timeout:g} s")
                )
            # A long buffer takes long to search: do not do it for each byte.
            pause = max(_GATHER_S, min(0.1, 4 * (monotonic() - began)))
            beyond = start + len(buffer)
            if self._stream.wait(beyond, _slice_ms(deadline)) > beyond:
                self._stream.wait(1 << 62, int(pause * 1000))

    def skip(self) -> None:
        """Let the next ``expect`` see only what is printed from now on."""
        self._at = self._stream.total

    def _ending(self) -> BaseException | None:
        return self.ended() if self.ended is not None else None

    def _raise_if_ended(self) -> None:
        error = self._ending()
        if error is not None:
            raise self._with_tail(error)

    def _with_tail(self, error: BaseException, *notes: str) -> BaseException:
        """The error with the console's tail, which a traceback shows the end of."""
        if getattr(error, "console", None) == "":
            error.console = self.tail()  # type: ignore[attr-defined]
        lines = self.tail().splitlines()[-_TAIL_LINES:]
        for note in (*notes, *(["the console's last lines:", *lines] if lines else [])):
            error.add_note(note)
        return error


def _late(deadline: float | None) -> bool:
    return deadline is not None and monotonic() >= deadline


def _slice_ms(deadline: float | None) -> int:
    if deadline is None:
        return _SLICE_MS
    return max(0, min(_SLICE_MS, int((deadline - monotonic()) * 1000) + 1))


def _name(pattern: Any) -> str:
    return repr(getattr(pattern, "pattern", pattern))


def _finder(pattern: Any) -> Callable[[bytearray, int], tuple[Any, int] | None]:
    """A function of (buffer, how much of it was searched before): (result, end offset) or None."""
    if isinstance(pattern, str):
        pattern = pattern.encode()
    if isinstance(pattern, (bytes, bytearray)):
        literal = bytes(pattern)

        def find(buffer: bytearray, seen: int) -> tuple[bytes, int] | None:
            i = buffer.find(literal, max(0, seen - max(0, len(literal) - 1)))
            return None if i < 0 else (bytes(buffer[: i + len(literal)]), i + len(literal))

        return find
    if not hasattr(pattern, "search"):
        raise TypeError(f"expect() takes a str, bytes or compiled pattern, not {pattern!r}")
    if isinstance(pattern.pattern, bytes):

        def search(buffer: bytearray, seen: int) -> tuple[Any, int] | None:
            match = pattern.search(bytes(buffer))
            return None if match is None else (match, match.end())

        return search

    def search_text(buffer: bytearray, seen: int) -> tuple[Any, int] | None:
        text = buffer.decode("utf-8", "surrogateescape")
        match = pattern.search(text)
        if match is None:
            return None
        return match, len(text[: match.end()].encode("utf-8", "surrogateescape"))

    return search_text

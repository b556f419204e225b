"""Console: send and expect over a stream and an input, without a guest."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vmm._native import ffi, lib
from vmm.chario import Input, Stream
from vmm.console import Console
from vmm.errors import GuestLost, GuestPanic, GuestTimeout


class Guest:
    def __init__(self, capacity: int = 1 << 16) -> None:
        self.stream = Stream(capacity)
        self.input = Input(64)
        self.console = Console(self.stream, self.input)

    def close(self) -> None:
        self.stream.close()
        self.input.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    g = Guest()
    yield g
    g.close()


def later(seconds: float, what: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, what)
    timer.start()
    return timer


def test_expect_goes_on_behind_the_match(guest: Guest) -> None:
    guest.stream.write(b"one two one three")
    assert guest.console.expect("one", 1) == b"one"
    assert guest.console.expect(b"one", 1) == b" two one"
    with pytest.raises(GuestTimeout):
        guest.console.expect("one", 0.01)
    assert guest.console.expect("three", 1) == b" three"
    assert guest.console.expect("", 1) == b""


def test_expect_waits_for_bytes_that_trickle(guest: Guest) -> None:
    def print_slowly() -> None:
        for c in b"Debian GNU/Linux\r\n\r\nlogin: ":
            guest.stream.write(bytes([c]))
            time.sleep(0.001)

    thread = threading.Thread(target=print_slowly)
    thread.start()
    assert guest.console.expect("login: ", 10).endswith(b"\nlogin: ")
    thread.join()


def test_expect_patterns(guest: Guest) -> None:
    guest.stream.write("größe 42 \udcff uid=7 end".encode("utf-8", "surrogateescape"))
    match = guest.console.expect(re.compile(r"größe (\d+)"), 1)
    assert match[1] == "42"
    assert guest.console.expect(re.compile(rb"uid=(\d+)"), 1)[1] == b"7"
    assert guest.console.expect(" end", 1) == b" end"
    with pytest.raises(TypeError, match="compiled pattern"):
        guest.console.expect(42)  # type: ignore[call-overload]


def test_text_offsets_survive_broken_utf8(guest: Guest) -> None:
    guest.stream.write(b"\xff\xc3\xff ok \xe2\x82 rest")
    guest.console.expect(re.compile("ok"), 1)
    assert guest.console.expect("rest", 1) == b" \xe2\x82 rest"


def test_timeout_carries_the_tail(guest: Guest) -> None:
    guest.stream.write(b"Kernel says\nsomething\n")
    began = time.monotonic()
    with pytest.raises(GuestTimeout, match=r"did not print 'login' within 0.2 s") as e:
        guest.console.expect("login", 0.2)
    assert time.monotonic() - began < 3
    assert e.value.console == "Kernel says\nsomething\n"
    assert e.value.status == 124


def test_a_guest_that_ended(guest: Guest) -> None:
    guest.console.ended = lambda: None
    error = GuestPanic("the guest's kernel panicked")

    def die() -> None:
        guest.stream.write(b"last words")
        guest.console.ended = lambda: error
        guest.stream.finish()

    timer = later(0.05, die)
    with pytest.raises(GuestPanic) as e:
        guest.console.expect("login", 30)
    timer.join()
    assert e.value.console == "last words"
    assert any("login" in note for note in e.value.__notes__)
    assert guest.console.expect("last", 1) == b"last"  # what it did print can still be expected
    with pytest.raises(GuestPanic):
        guest.console.send("x")


def test_ended_without_a_closed_stream_is_noticed(guest: Guest) -> None:
    guest.console.ended = lambda: GuestLost("gone") if time.monotonic() > end else None
    end = time.monotonic() + 0.2
    with pytest.raises(GuestLost):
        guest.console.expect("x", None)


def test_flood_does_not_grow_the_buffer() -> None:
    guest = Guest(capacity=4096)
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            guest.stream.write(b"y" * 1000)

    thread = threading.Thread(target=flood)
    thread.start()
    with pytest.raises(GuestTimeout):
        guest.console.expect("never", 0.3)
    stop.set()
    thread.join()
    guest.stream.write(b"never")
    assert guest.console.expect("never", 2).endswith(b"never")
    guest.close()


def test_send(guest: Guest) -> None:
    guest.console.send("ls -l ä\n")
    assert guest.input.level == 9
    taken = bytearray()

    def take() -> None:
        buf = ffi.new("uint8_t[]", 16)
        while len(taken) < 1009:
            taken.extend(ffi.buffer(buf, lib.vmm_input_pull(guest.input.native, buf, 16)))

    thread = threading.Thread(target=take)
    thread.start()
    guest.console.send(b"z" * 1000)
    thread.join()
    assert bytes(taken) == "ls -l ä\n".encode() + b"z" * 1000


def test_send_to_a_guest_that_does_not_read(guest: Guest) -> None:
    with pytest.raises(GuestTimeout, match="36 bytes were not taken"):
        guest.console.send(b"z" * 100, timeout=0.1)


def test_console_without_a_keyboard() -> None:
    stream = Stream(100)
    console = Console(stream)
    console.send_break()
    with pytest.raises(GuestLost):
        console.send("x")
    stream.close()


def test_text_and_tail(guest: Guest) -> None:
    assert (guest.console.text, guest.console.tail(), guest.console.total) == ("", "", 0)
    guest.stream.write(b"one\ntwo\nthree \xff\n")
    assert guest.console.text == "one\ntwo\nthree �\n"
    assert guest.console.tail(12) == "three �\n"
    assert guest.console.tail(100) == guest.console.text
    assert guest.console.total == 16
    guest.console.skip()
    guest.stream.write(b"four")
    assert guest.console.expect("four", 1) == b"four"


def test_ctrl_c_ends_an_endless_wait(guest: Guest) -> None:
    timer = later(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        guest.console.expect("never", None)
    assert time.monotonic() - began < 3
    timer.join()


def test_gil_is_free_while_waiting(guest: Guest) -> None:
    counted = 0
    timer = later(0.3, lambda: guest.stream.write(b"done"))
    thread = threading.Thread(target=lambda: guest.console.expect("done", 10))
    thread.start()
    while thread.is_alive():
        counted += 1
        time.sleep(0.001)
    timer.join()
    assert counted > 20

"""Streams, sinks and inputs: slow, broken and endless peers on either side."""

from __future__ import annotations

import errno
import os
import pty
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import tasks, wait_for
from vmm._native import lib
from vmm.chario import EOF, HELP, QUIT, Input, Sink, Stream, Watch
from vmm.errors import HostError


@pytest.fixture
def stream() -> Iterator[Stream]:
    s = Stream(8192)
    yield s
    s.close()


@pytest.fixture
def loop() -> Iterator[object]:
    lp = lib.vmm_loop_create()
    yield lp
    lib.vmm_loop_destroy(lp)


# ---- streams -----------------------------------------------------------------------------------


def test_stream_keeps_the_tail(stream: Stream) -> None:
    for i in range(1000):
        stream.write(b"%04d-" % i)
    start, data = stream.read(0)
    assert (start, len(data), stream.total) == (5000 - len(data), 5000, 5000)
    stream.write(b"x" * 20000)
    start, data = stream.read(0)
    assert (start, data) == (25000 - 8192, b"x" * 8192)
    stream.write(b"end")
    assert stream.read(24999)[1] == b"xend"
    assert stream.read(1 << 60) == (25003, b"")


def test_room_without_a_reader_is_endless(stream: Stream) -> None:
    assert lib.vmm_stream_room(stream.native) == 0xFFFFFFFF
    assert lib.vmm_stream_offer(stream.native, b"a" * 30000, 30000) == 30000


def test_closed_stream_swallows_offers(stream: Stream) -> None:
    stream.finish()
    assert lib.vmm_stream_offer(stream.native, b"abc", 3) == 3
    assert stream.total == 0
    assert stream.wait(0, 1000) == 0


def test_watch(stream: Stream) -> None:
    watch = Watch(stream, (b"Kernel panic - not syncing", b"login:"))
    assert watch.matched() == []
    stream.write(b"debian log")
    stream.write(b"in: ")
    assert watch.matched() == [b"login:"]
    assert select.select([watch.fd], [], [], 0)[0]
    stream.write(b"Kernel Kernel panic - not syncing: x")
    assert len(watch.matched()) == 2
    watch.close()
    stream.write(b"login:")
    with pytest.raises(ValueError, match="cannot watch"):
        Watch(stream, (b"x" * 64,))


# ---- sinks -------------------------------------------------------------------------------------


def test_sink_to_file(stream: Stream, tmp_path: Path) -> None:
    stream.write(b"before ")
    with open(tmp_path / "out", "wb") as f:
        sink = Sink(stream, f.fileno())
        stream.write(b"after")
        assert sink.flush()
        assert (sink.written, sink.dropped, sink.error) == (12, 0, 0)
        sink.close()
    assert (tmp_path / "out").read_bytes() == b"before after"


def test_sink_limit(stream: Stream, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as f:
        sink = Sink(stream, f.fileno(), limit=100)
        for _ in range(50):
            lib.vmm_stream_offer(stream.native, b"0123456", 7)
            assert sink.flush()
        assert (sink.written, sink.dropped) == (100, 250)
        sink.close()
    text = (tmp_path / "out").read_bytes()
    assert text == (b"0123456" * 15)[:100] + b"\n[vmm: console limit reached]\n"
    assert stream.total == 350


def test_sink_to_a_stuck_pipe_holds_nobody(stream: Stream) -> None:
    r, w = os.pipe()
    sink = Sink(stream, w)
    assert os.get_blocking(w)  # the flag of a shared description is not ours to change
    sent = 0
    wait_stuck = time.monotonic() + 0.3
    while time.monotonic() < wait_stuck:
        sent += lib.vmm_stream_offer(stream.native, b"y" * 1000, 1000)
    assert sent < (1 << 20)
    assert not sink.flush(0.05)
    before = time.monotonic()
    sink.close()
    assert time.monotonic() - before < 2
    os.close(r)
    os.close(w)


def test_sink_delivers_everything_to_a_slow_reader(stream: Stream) -> None:
    r, w = os.pipe()
    sink = Sink(stream, w)
    got = bytearray()

    def read() -> None:
        while chunk := os.read(r, 3000):
            got.extend(chunk)
            time.sleep(0.0005)

    thread = threading.Thread(target=read)
    thread.start()
    data = os.urandom(300_000)
    at = 0
    while at < len(data):
        part = data[at : at + 1700]
        n = lib.vmm_stream_offer(stream.native, part, len(part))
        at += n
        if n < len(part):
            time.sleep(0.0005)
    assert sink.flush()
    sink.close()
    os.close(w)
    thread.join()
    os.close(r)
    assert bytes(got) == data


def test_sink_whose_reader_is_gone(stream: Stream) -> None:
    r, w = os.pipe()
    sink = Sink(stream, w)
    os.close(r)
    stream.write(b"hello")
    assert sink.flush()
    assert sink.error == errno.EPIPE
    for _ in range(100):
        assert lib.vmm_stream_offer(stream.native, b"z" * 1000, 1000) == 1000
        assert sink.flush()
    assert sink.dropped == 100_005
    sink.close()
    os.close(w)


def test_sink_to_a_full_device(stream: Stream) -> None:
    with open("/dev/full", "wb", buffering=0) as f:
        sink = Sink(stream, f.fileno())
        stream.write(b"hello")
        assert sink.flush()
        assert (sink.error, sink.dropped) == (errno.ENOSPC, 5)
        sink.close()


def test_sink_to_a_socket(stream: Stream) -> None:
    a, b = socket.socketpair()
    sink = Sink(stream, a.fileno())
    sent = received = 0
    b.setblocking(False)
    while sent < 2_000_000:
        n = lib.vmm_stream_offer(stream.native, b"s" * 500, 500)
        sent += n
        if n < 500:
            received += len(b.recv(1 << 20)) if select.select([b], [], [], 5)[0] else 0
    while not sink.flush(0.01):
        received += len(b.recv(1 << 20))
    sink.close()
    a.close()
    while chunk := b.recv(1 << 20):
        received += len(chunk)
    assert received == sent
    b.close()


def test_sink_to_a_nonblocking_pipe(stream: Stream) -> None:
    r, w = os.pipe()
    os.set_blocking(w, False)
    sink = Sink(stream, w)
    while lib.vmm_stream_offer(stream.native, b"n" * 900, 900) == 900:
        pass
    got = 0
    while not sink.flush(0.01):
        got += len(os.read(r, 1 << 16))
    sink.close()
    os.close(w)
    while chunk := os.read(r, 1 << 16):
        got += len(chunk)
    assert got == stream.total
    os.close(r)


def test_sink_to_a_pty_from_both_ends(stream: Stream) -> None:
    master, slave = pty.openpty()
    sink = Sink(stream, slave)
    stream.write(b"to the master")
    assert sink.flush()
    assert os.read(master, 100) == b"to the master"
    sink.close()
    sink = Sink(stream, master)
    stream.write(b"\n")
    assert sink.flush()
    assert os.read(slave, 100) == b"to the master\n"
    sink.close()
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_sink_refuses_what_cannot_be_written(stream: Stream, flags: int, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    fd = os.open(tmp_path / "f", flags)
    with pytest.raises(HostError, match="cannot write console output to log"):
        Sink(stream, fd, name="log")
    os.close(fd)
    with pytest.raises(HostError):
        Sink(stream, 9999)


def test_two_sinks_each_get_everything(stream: Stream, tmp_path: Path) -> None:
    files = [open(tmp_path / name, "wb") for name in "ab"]  # noqa: SIM115
    sinks = [Sink(stream, f.fileno()) for f in files]
    for i in range(2000):
        part = b"%d\n" % i
        while lib.vmm_stream_room(stream.native) < len(part):
            time.sleep(0.001)
        lib.vmm_stream_offer(stream.native, part, len(part))
    for sink, f in zip(sinks, files, strict=True):
        assert sink.flush()
        sink.close()
        f.close()
    want = b"".join(b"%d\n" % i for i in range(2000))
    assert [(tmp_path / name).read_bytes() for name in "ab"] == [want, want]


def test_create_and_drop_leaks_nothing(stream: Stream) -> None:
    r, w = os.pipe()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), tasks()

    before = held()
    for _ in range(200):
        sink = Sink(stream, w)
        sink.close()
    wait_for(lambda: held() == before)
    os.close(r)
    os.close(w)


# ---- inputs ------------------------------------------------------------------------------------


def pull(inp: Input, n: int = 1 << 16) -> bytes:
    from vmm._native import ffi

    buf = ffi.new("uint8_t[]", n)
    return bytes(ffi.buffer(buf, lib.vmm_input_pull(inp.native, buf, n)))


def test_input_is_bounded() -> None:
    inp = Input(100)
    assert inp.push(b"a" * 70) == 70
    assert inp.push(b"b" * 70) == 30
    assert inp.push(b"c") == 0
    assert inp.wait(10) == 0
    assert pull(inp, 90) == b"a" * 70 + b"b" * 20
    assert inp.wait(10) == 90
    assert (inp.level, inp.total, inp.eof) == (10, 100, False)
    inp.finish()
    assert inp.push(b"d") == 0
    assert not inp.eof
    assert pull(inp) == b"b" * 10
    assert inp.eof
    assert inp.drain(0)
    inp.close()


def test_stdin_pipe_is_not_read_faster_than_the_guest_takes(loop: object) -> None:
    inp = Input(4096)
    r, w = os.pipe()
    ev = os.eventfd(0, os.EFD_NONBLOCK)
    inp.attach(loop, r, eventfd=ev)
    data = os.urandom(1 << 18)

    def feed() -> None:
        at = 0
        while at < len(data):
            at += os.write(w, data[at:])
        os.close(w)

    thread = threading.Thread(target=feed)
    thread.start()
    time.sleep(0.05)
    assert thread.is_alive()
    assert inp.level == 4096
    got = bytearray()
    while not inp.eof:
        part = pull(inp, 777)
        got += part
        if not part:
            select.select([ev], [], [], 0.01)
    thread.join()
    assert bytes(got) == data
    assert inp.events() == EOF
    inp.detach()
    inp.close()
    os.close(r)
    os.close(ev)


@pytest.mark.parametrize("size", [0, 1, 4096, 100_000])
def test_stdin_regular_file(loop: object, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "in").write_bytes(data)
    fd = os.open(tmp_path / "in", os.O_RDONLY)
    inp = Input(1000)
    inp.attach(loop, fd)
    got = bytearray()
    end = time.monotonic() + 10
    while not inp.eof:
        got += pull(inp, 300)
        assert time.monotonic() < end
    assert bytes(got) == data
    inp.close()  # detaches by itself
    os.close(fd)


def test_stdin_dev_null_socket_and_endless_zero(loop: object) -> None:
    for path, ends in (("/dev/null", True), ("/dev/zero", False)):
        fd = os.open(path, os.O_RDONLY)
        inp = Input(1000)
        inp.attach(loop, fd)
        wait_for(lambda i=inp, e=ends: i.eof if e else i.level == 1000)
        inp.close()
        os.close(fd)
    a, b = socket.socketpair()
    inp = Input()
    inp.attach(loop, a.fileno())
    b.sendall(b"over a socket")
    wait_for(lambda: inp.level == 13)
    b.close()
    wait_for(lambda: inp.events() & EOF)
    assert pull(inp) == b"over a socket"
    inp.close()
    a.close()


def test_escapes_on_a_terminal(loop: object) -> None:
    master, slave = pty.openpty()
    import tty

    tty.setraw(slave)
    ev = os.eventfd(0, os.EFD_NONBLOCK)
    inp = Input()
    inp.attach(loop, slave, escapes=True, eventfd=ev)
    os.write(master, b"ab\x01acd\x01\x01e\x01lf\x01")
    wait_for(lambda: inp.level == 10)
    os.write(master, b"h")
    wait_for(lambda: select.select([ev], [], [], 0)[0])
    assert inp.events() == HELP
    os.write(master, b"\x01xg")
    wait_for(lambda: inp.level == 11)
    assert inp.events() == QUIT
    assert pull(inp) == b"ab\x01cd\x01e\x01lfg"
    os.close(slave)
    os.close(master)
    wait_for(lambda: inp.eof)
    inp.close()
    os.close(ev)


def test_no_escapes_without_a_terminal(loop: object) -> None:
    r, w = os.pipe()
    inp = Input()
    inp.attach(loop, r, escapes=True)
    os.write(w, b"\x01x")
    wait_for(lambda: inp.level == 2)
    assert inp.events() == 0
    with pytest.raises(HostError, match="cannot read console input"):
        inp.attach(loop, r)
    inp.close()
    os.close(r)
    os.close(w)


def test_attach_refuses_a_bad_descriptor(loop: object) -> None:
    inp = Input()
    with pytest.raises(HostError):
        inp.attach(loop, 9999)
    fd = os.open("/dev/null", os.O_WRONLY)
    with pytest.raises(HostError):
        inp.attach(loop, fd)
    os.close(fd)
    inp.close()


def test_attach_and_detach_leak_nothing(loop: object) -> None:
    r, w = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    inp = Input(16)
    os.write(w, b"x" * 1000)
    for _ in range(100):
        inp.attach(loop, r)
        inp.detach()
    assert len(os.listdir("/proc/self/fd")) == before
    inp.close()
    os.close(r)
    os.close(w)

"""virtio-net from the driver's side, with a socket of ours as the network: virtio-v1.3 §5.1."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.virtio_net import CTRL, HDR, KINDS, MAC, MRG_RXBUF, PLAIN, Card, frame
from tests.virtio_rig import TRANSPORTS
from vmm.devices.virtio.net import Net
from vmm.devices.virtio.net_backend import Backend, Server, connect

Make = Callable[..., Card]


@pytest.fixture
def make() -> Iterator[Make]:
    cards: list[Card] = []

    def build(*args: Any, **kw: Any) -> Card:
        cards.append(Card(*args, **kw))
        return cards[-1]

    yield build
    for card in cards:
        card.close()


@pytest.fixture(params=[(kind, packed) for kind in KINDS for packed in (False, True)], ids=str)
def card(request: pytest.FixtureRequest, make: Make) -> Card:
    card = make(request.param[0], packed=request.param[1])
    card.driver.start()
    return card


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_configuration_space(make: Make, transport: str) -> None:
    card = make("seq", transport, mtu=9000)
    card.driver.start()
    assert card.regs.device_id() == 1
    assert bytes(card.regs.config(i, 1) for i in range(6)) == MAC
    assert card.regs.config(6, 2) == 1
    assert card.regs.config(8, 2) == 1
    assert card.regs.config(10, 2) == 9000


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_frames_both_ways(make: Make, kind: str, transport: str) -> None:
    card = make(kind, transport)
    card.driver.start()
    card.offer(2048, count=40)
    for size in (14, 15, 60, 64, 65, 1000, 1514, 1518):
        sent = frame(size, size)
        card.transmit(sent)
        assert card.recv() == sent
        card.send(sent)
        header, got = card.received()
        assert got == sent
        assert header == bytes(10) + b"\1\0"
    stats = card.net.stats()
    assert stats["tx_frames"] == stats["rx_frames"] == 8
    assert stats["tx_bytes"] == stats["rx_bytes"] == 14 + 15 + 60 + 64 + 65 + 1000 + 1514 + 1518


@pytest.mark.parametrize("cuts", [[1], [12], [5, 12], [11, 13], [12, 13, 26], [1, 2, 3, 4, 40]])
def test_transmit_chains_cut_anywhere(card: Card, cuts: list[int]) -> None:
    sent = frame(500)
    whole = bytes(HDR) + sent
    edges = [0, *cuts, len(whole)]
    for indirect in (False, True):
        card.tx.add([whole[a:b] for a, b in itertools.pairwise(edges)], [], indirect=indirect)
        card.tx.kick()
        assert card.recv() == sent
        assert card.tx.wait()[1] == 0


@pytest.mark.parametrize("sizes", [[12, 2000], [1, 11, 2000], [5, 9, 3, 2000], [13] * 120])
def test_receive_chains_cut_anywhere(make: Make, sizes: list[int]) -> None:
    for kind in KINDS:
        for wanted in (PLAIN, PLAIN & ~MRG_RXBUF):
            card = make(kind)
            card.driver.start(wanted=wanted)
            card.offer(*sizes)
            sent = frame(1400)
            card.send(sent)
            header, got = card.received()
            assert (header, got) == (bytes(10) + b"\1\0", sent)


@pytest.mark.parametrize(
    ("size", "room"),
    [
        (size, room)
        for size in (100, 1514, 9000, 65535, 65553)
        for room in (12, 40, 1526, 4096, 70000)
        if -(-(size + HDR) // room) <= 256  # as many as the queue has
    ],
)
def test_frames_over_several_buffers(card: Card, size: int, room: int) -> None:
    need = -(-(size + HDR) // room)
    card.offer(room, count=min(256, need + 1))
    sent = frame(size)
    card.send(sent)
    header, got = card.received()
    assert got == sent
    assert header == bytes(10) + struct.pack("<H", need)
    assert card.rx.take() is None


def test_a_frame_waits_for_the_buffers_it_lacks(card: Card) -> None:
    card.offer(1000, count=2)
    sent = frame(5000)
    card.send(sent)
    card.settle_all()
    assert card.rx.take() is None
    card.offer(1000)
    card.settle_all()
    assert card.rx.take() is None
    card.offer(700, count=4)
    assert card.received()[1] == sent
    assert card.net.stats()["rx_dropped"] == 0


def test_a_frame_that_no_queue_can_hold_is_dropped(make: Make) -> None:
    card = make("stream")
    card.driver.start(size=16)
    card.offer(1000, count=16)
    card.send(frame(20000))
    after = frame(900)
    card.send(after)
    assert card.received()[1] == after
    assert card.net.stats()["rx_dropped"] == 1


def test_without_mergeable_buffers_a_long_frame_is_dropped(make: Make) -> None:
    card = make("stream")
    card.driver.start(wanted=PLAIN & ~MRG_RXBUF)
    card.offer(1526, count=3)
    for size in (1515, 9000, 1514):
        card.send(frame(size))
    header, got = card.received()
    assert len(got) == 1514
    assert header[10:] == b"\1\0"
    assert card.net.stats()["rx_dropped"] == 2


def test_bytes_beyond_the_frame_stay(card: Card) -> None:
    addr = card.driver.alloc(0)  # where the next buffer will be
    card.rx.add([], [3000])
    card.memory.write(addr, b"\xa5" * 3000)
    card.rx.kick()
    card.send(frame(60))
    assert card.rx.wait()[1] == 72
    assert card.memory.read(addr + 72, 3000 - 72) == b"\xa5" * (3000 - 72)


@pytest.mark.parametrize("size", [0, 1, 13])
def test_runts(card: Card, size: int) -> None:
    """Too short to be frames: dropped, both ways."""
    card.offer(2000, count=4)
    if not (size == 0 and card.kind == "seq"):  # there it is the end
        card.send(frame(size))
    card.transmit(frame(size) if size else b"")
    assert card.tx.wait()[1] == 0
    whole = frame(100)
    card.send(whole)
    assert card.received()[1] == whole
    card.transmit(whole)
    assert card.recv() == whole
    assert card.net.stats()["tx_dropped"] == 1


@pytest.mark.parametrize("size", [1, 2, 11])
def test_a_chain_shorter_than_its_header(card: Card, size: int) -> None:
    card.tx.add([bytes(size)], [])
    card.tx.kick()
    card.until_broken()


def test_receive_chains_that_make_no_sense(make: Make) -> None:
    for readable, writable in (([b"x"], [2000]), ([b"x"], []), ([], [11]), ([], [5, 6])):
        card = make("seq")
        card.driver.start()
        card.rx.add(readable, writable)
        card.rx.kick()
        card.until_broken()
        card.driver.reset()
        card.driver.start()
        card.offer(2000)
        sent = frame(99)
        card.send(sent)
        assert card.received()[1] == sent


def test_a_frame_longer_than_any_is_dropped(make: Make) -> None:
    card = make("stream")
    card.driver.start()
    card.tx.add([bytes(HDR) + bytes(70000)], [])
    card.tx.kick()
    card.tx.wait()
    assert card.net.stats()["tx_dropped"] == 1
    assert card.quiet()


@pytest.mark.parametrize(
    ("flags", "gso"), [(1, 0), (0, 1), (0, 3), (0, 4), (0, 5), (0, 0x80), (1, 0x81), (0, 255)]
)
def test_offloads_that_were_not_negotiated(card: Card, flags: int, gso: int) -> None:
    card.transmit(frame(1000), struct.pack("<BBHHHHH", flags, gso, 54, 500, 34, 16, 0))
    card.tx.wait()
    assert card.net.stats()["tx_dropped"] == 1
    assert card.quiet()


def test_flags_without_meaning_are_ignored(card: Card) -> None:
    sent = frame(100)
    card.transmit(sent, struct.pack("<BBHHHHH", 0xFE, 0, 1, 2, 3, 4, 0xFFFF))
    assert card.recv() == sent


def test_a_batch_is_one_interrupt_and_in_order(make: Make) -> None:
    """Several hundred small frames at once: more than a batch, more than the ring's half."""
    for kind in KINDS:
        card = make(kind)
        card.driver.start()
        frames = [frame(60 + i % 40, i) for i in range(120)]
        for data in frames:
            card.tx.add([bytes(HDR), data], [])
        card.tx.kick()
        assert [card.recv() for _ in frames] == frames
        heads = [card.tx.wait()[0] for _ in frames]
        assert heads == sorted(heads)


def test_back_pressure_from_the_peer(card: Card) -> None:
    """A peer that does not read holds the guest's buffers, and gets everything once it does."""
    frames, taken = [frame(1400, i) for i in range(300)], 0
    queue = card.tx
    for data in frames[:100]:
        queue.add([bytes(HDR) + data], [])
    queue.kick()
    card.settle_all()
    sent, got = 100, []
    while len(got) < len(frames):
        while sent < len(frames) and queue.free:
            queue.add([bytes(HDR) + frames[sent]], [])
            sent += 1
        queue.kick()
        got.append(card.recv())
        while queue.take() is not None:
            taken += 1
    assert got == frames
    while taken < len(frames):
        queue.wait()
        taken += 1


def test_back_pressure_from_the_guest(card: Card) -> None:
    """Without buffers nothing is read: the socket fills, and is emptied once there are some."""
    card.peer.settimeout(0)
    frames: list[bytes] = []
    rest = b""
    while True:
        data = frame(1000, len(frames))
        raw = (struct.pack(">I", len(data)) if card.kind == "stream" else b"") + data
        try:
            done = card.peer.send(raw)
        except BlockingIOError:
            break
        frames.append(data)
        if done < len(raw):
            rest = raw[done:]
            break
    assert len(frames) < 2000
    card.settle_all()
    assert card.rx.take() is None
    card.peer.settimeout(5)
    got = []
    for _ in frames:
        if len(got) == len(frames) - 1 and rest:
            card.peer.sendall(rest)
        card.offer(1500)
        got.append(card.received()[1])
    assert got == frames
    assert card.net.stats()["rx_dropped"] == 0


def test_stream_in_pieces(make: Make) -> None:
    """Length and frame arrive in pieces of any size."""
    card = make("stream")
    card.driver.start()
    pick = random.Random(7)
    frames = [frame(pick.choice([14, 60, 1514, 9000, 65000]), i) for i in range(40)]
    raw = b"".join(struct.pack(">I", len(f)) + f for f in frames)
    at, got = 0, 0
    while got < len(frames):
        if at < len(raw):
            size = pick.choice([1, 2, 3, 4, 5, 700, 20000])
            card.peer.sendall(raw[at : at + size])
            at += size
        if card.rx.size - len(card.rx.free) < 1:
            card.driver.next = 0x20_0000
            card.offer(70000, count=2)
        card.settle_all()
        while card.rx.used_idx != card.rx.seen:
            assert card.received()[1] == frames[got]
            got += 1


@pytest.mark.parametrize("length", [65536 + 65, 1 << 24, 0xFFFFFFFF])
def test_a_peer_that_talks_nonsense_loses_the_link(make: Make, length: int) -> None:
    card = make("stream")
    card.driver.start()
    card.offer(2000, count=2)
    card.peer.sendall(struct.pack(">I", length) + b"x" * 100)
    card.until(lambda: not card.net.link, "link down")
    assert any("no frame" in fault for fault in card.net.faults())


def test_a_peer_that_dies(card: Card) -> None:
    """What it sent last still arrives; then the link is down, and the guest's frames go nowhere."""
    card.offer(2000, count=2)
    last = frame(777)
    card.send(last)
    assert card.received()[1] == last
    card.regs.interrupts()
    card.peer.close()
    for _ in range(3):
        card.transmit(frame(100))
        card.tx.wait()
    card.until(lambda: not card.net.link, "link down")
    assert card.regs.config(6, 2) == 0
    assert card.regs.interrupts() & 2
    card.transmit(frame(100))
    card.tx.wait()
    assert card.net.stats()["tx_dropped"] >= 1
    assert not card.broken
    card.driver.reset()
    card.driver.start()
    assert card.regs.config(6, 2) == 0
    assert len(card.net.faults()) == 1


def test_a_peer_that_dies_while_nobody_reads(make: Make) -> None:
    """No buffers, a full socket, and a hang-up: told once, and nothing spins."""
    for kind in ("stream", "seq"):
        card = make(kind)
        card.driver.start()
        card.send(frame(100))
        card.settle_all()
        card.peer.close()
        card.until(lambda card=card: not card.net.link, "link down")  # type: ignore[misc]


def test_a_peer_that_dies_with_frames_waiting_for_it(make: Make) -> None:
    card = make("stream")
    card.driver.start()
    count = 0
    while len(card.tx.free) > 1 and count < 1500:
        card.driver.next = 0x20_0000
        card.tx.add([bytes(HDR) + frame(60000)], [])
        card.tx.kick()
        card.settle_all()
        if card.tx.take() is None:
            count += 1
            if count > 20:
                break
    card.peer.close()
    for _ in list(card.tx.pending):
        card.tx.wait()
    assert not card.net.link


def test_reset_in_the_middle_of_a_frame(make: Make) -> None:
    """The peer still gets that frame whole, and then those of the next driver."""
    card = make("stream")
    card.driver.start()
    first: list[bytes] = []
    while True:
        card.driver.next = 0x10_0000 + 0x1_1000 * (len(first) % 40)
        first.append(frame(60000, len(first)))
        card.transmit(first[-1])
        card.settle_all()
        if card.tx.take() is None:
            break
    stuck = len(first)
    card.driver.reset()
    card.memory.write(0x10_0000, bytes(0x1_1000 * 40))
    card.driver.next = 0x1_0000
    card.driver.start()
    second = frame(200, 12345)
    card.transmit(second)
    got = []
    while not got or got[-1] != second:
        got.append(card.recv())
    assert got[:-1] == first[: len(got) - 1]
    assert stuck - 1 <= len(got) - 1 <= stuck


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_reset_of_one_queue(make: Make, transport: str) -> None:
    """The others go on; nothing of it is touched until it is enabled again."""
    card = make("stream", transport)
    card.driver.start()
    card.offer(2000, count=3)
    assert card.regs.reset_queue(0)
    first, second = frame(300, 1), frame(200, 2)
    card.send(first)
    card.transmit(second)
    assert card.recv() == second
    card.driver.setup_queue(0)
    card.offer(2000)
    assert card.received()[1] == first
    assert card.regs.reset_queue(1)
    card.driver.setup_queue(1)
    card.transmit(first)
    assert card.recv() == first
    assert card.regs.reset_queue(CTRL)
    card.driver.setup_queue(CTRL)
    assert card.command(0, 0, b"\1") == 0


def test_link_state(card: Card) -> None:
    card.offer(2000, count=4)
    card.regs.interrupts()
    card.net.set_link(False)
    assert card.regs.config(6, 2) == 0
    assert card.regs.interrupts() & 2
    card.transmit(frame(100))
    card.tx.wait()
    assert card.quiet()
    assert card.net.stats()["tx_dropped"] == 1
    card.net.set_link(True)
    assert card.regs.config(6, 2) == 1
    sent = frame(100)
    card.send(sent)
    assert card.received()[1] == sent
    card.transmit(sent)
    assert card.recv() == sent


def test_link_state_before_the_driver_comes(make: Make) -> None:
    card = make()
    card.net.set_link(False)
    card.driver.start()
    assert card.regs.config(6, 2) == 0


def test_no_backend(make: Make) -> None:
    card = make(backend=Backend())
    card.driver.start()
    assert card.regs.config(6, 2) == 0
    card.offer(2000)
    card.transmit(frame(100))
    card.tx.wait()
    assert card.net.stats()["tx_dropped"] == 1
    card.net.set_link(True)
    assert card.regs.config(6, 2) == 0


# ---- limits -------------------------------------------------------------------------------------


def test_frames_are_limited(make: Make) -> None:
    """A burst, then none until time has passed; a change is felt at once."""
    card = make("seq", limits={"tx_frames": (1, 5), "rx_frames": (1, 7)})
    card.driver.start()
    card.offer(2000, count=20)
    for i in range(12):
        card.tx.add([bytes(HDR) + frame(60, i)], [])
        card.send(frame(60, i))
    card.tx.kick()
    for _ in range(5):
        card.recv()
    assert card.quiet()
    assert card.net.stats()["rx_frames"] == 7
    card.net.limit(tx_frames=(0, 0), rx_frames=(0, 0))
    for _ in range(7):
        card.recv()
    card.until(lambda: card.net.stats()["rx_frames"] == 12, "twelve frames")


def test_bytes_are_limited_and_time_frees_them(make: Make) -> None:
    card = make("stream", limits={"tx_bytes": (200_000, 3000), "rx_bytes": (200_000, 3000)})
    card.driver.start()
    card.offer(2000, count=20)
    frames = [frame(1500, i) for i in range(12)]
    for data in frames:
        card.tx.add([bytes(HDR) + data], [])
        card.send(data)
    card.tx.kick()
    assert [card.recv() for _ in frames] == frames
    assert [card.received()[1] for _ in frames] == frames


# ---- the dump -----------------------------------------------------------------------------------


def test_pcap(make: Make, tmp_path: Any) -> None:
    path = tmp_path / "dump.pcap"
    card = make("stream", pcap=str(path))
    card.driver.start()
    card.offer(200, count=20)
    frames = [frame(size, size) for size in (60, 700, 1514)]
    for data in frames:
        card.transmit(data)
        assert card.recv() == data
        card.send(data)
        assert card.received()[1] == data
    card.net.close()
    raw = path.read_bytes()
    assert struct.unpack("<IHHiIII", raw[:24])[::6] == (0xA1B2C3D4, 1)
    at, found = 24, []
    while at < len(raw):
        _, _, size, whole = struct.unpack("<IIII", raw[at : at + 16])
        assert size == whole
        found.append(raw[at + 16 : at + 16 + size])
        at += 16 + size
    assert found == [data for pair in zip(frames, frames, strict=True) for data in pair]


# ---- the control queue ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "command", "data", "ack"),
    [
        *[(0, mode, b"\1", 0) for mode in range(6)],
        (0, 6, b"\1", 1),
        (0, 0, b"", 1),
        (0, 0, b"\1\1", 1),
        (1, 0, struct.pack("<I", 0) * 2, 0),
        (1, 0, struct.pack("<I", 1) + MAC + struct.pack("<I", 2) + MAC * 2, 0),
        (1, 0, struct.pack("<I", 2) + MAC + struct.pack("<I", 0), 1),
        (1, 0, struct.pack("<I", 0xFFFFFFFF) + MAC, 1),
        (1, 0, struct.pack("<II", 0, 0xFFFFFFFF), 1),
        (1, 0, struct.pack("<II", 0, 0) + b"x", 1),
        (1, 0, b"", 1),
        (1, 0, b"\0\0\0", 1),
        (1, 1, MAC[:5], 1),
        (1, 1, MAC + b"x", 1),
        (1, 2, MAC, 1),
        (2, 0, b"\1\0", 0),
        (2, 1, b"\xff\x0f", 0),
        (2, 0, b"\0\x10", 1),
        (2, 2, b"\1\0", 1),
        (2, 0, b"\1", 1),
        (3, 0, b"", 0),
        (3, 1, b"", 1),
        (3, 0, b"x", 1),
        (4, 0, b"\1\0", 1),  # no MQ
        (5, 0, bytes(8), 1),  # no offloads
        (6, 0, b"", 1),
        (255, 255, b"\xff" * 300, 1),
    ],
)
def test_control_commands(make: Make, group: int, command: int, data: bytes, ack: int) -> None:
    card = make()
    card.driver.start()
    assert card.driver.queues[CTRL].request([bytes([group, command]) + data], [1])[1][0] == ack
    assert card.net.stats()["command_errors"] == ack


def test_commands_need_their_features(make: Make) -> None:
    card = make()
    card.driver.start(wanted=PLAIN & ~(1 << 18 | 1 << 19 | 1 << 21 | 1 << 23))
    for group, data in ((0, b"\1"), (2, b"\1\0"), (3, b"")):
        assert card.command(group, 0, data) == 1 if data else True
    assert card.command(1, 1, MAC) == 1


def test_the_driver_sets_an_address(make: Make) -> None:
    card = make()
    card.driver.start()
    other = bytes.fromhex("02aabbccddee")
    assert card.command(1, 1, other) == 0
    assert bytes(card.regs.config(i, 1) for i in range(6)) == other
    card.driver.reset()
    assert bytes(card.regs.config(i, 1) for i in range(6)) == MAC


def test_announcement(make: Make) -> None:
    card = make()
    card.driver.start()
    card.regs.interrupts()
    card.net.announce()
    assert card.regs.config(6, 2) == 3
    assert card.regs.interrupts() & 2
    assert card.driver.queues[CTRL].request([b"\3\0"], [1])[1] == b"\0"
    assert card.regs.config(6, 2) == 1


def test_no_announcement_that_was_not_negotiated(make: Make) -> None:
    card = make()
    card.driver.start(wanted=PLAIN & ~(1 << 21))
    card.net.announce()
    assert card.regs.config(6, 2) == 1


@pytest.mark.parametrize(("readable", "writable"), [([b"\0\0\1"], []), ([b"\0"], [1]), ([], [1])])
def test_commands_that_make_no_sense(
    make: Make, readable: list[bytes], writable: list[int]
) -> None:
    card = make()
    card.driver.start()
    card.driver.queues[CTRL].add(readable, writable)
    card.driver.queues[CTRL].kick()
    card.until_broken()
    card.driver.reset()
    card.driver.start()
    assert card.command(0, 0, b"\1") == 0


# ---- the other machine ---------------------------------------------------------------------------


def test_two_machines_on_one_cable(make: Make, tmp_path: Any) -> None:
    """The server waits for the client, and for the next when that has gone."""
    path = str(tmp_path / "cable")
    server = make("stream", backend=Server(path))
    server.driver.start()
    server.offer(2000, count=20)
    assert server.regs.config(6, 2) == 0
    server.transmit(frame(100))
    server.tx.wait()
    for turn in range(3):
        client = Card("stream", backend=connect(path))
        client.driver.start()
        client.offer(2000, count=20)
        server.until(lambda: server.net.link, "link up")
        assert server.regs.config(6, 2) == 1
        for i in range(5):
            sent = frame(200, 10 * turn + i)
            client.transmit(sent)
            assert server.received()[1] == sent
            server.transmit(sent)
            assert client.received()[1] == sent
        assert client.net.mac == server.net.mac == MAC
        client.close()
        server.until(lambda: not server.net.link, "link down")
    assert server.net.stats()["rx_frames"] == 15


def test_the_server_outlives_nonsense_and_resets(make: Make, tmp_path: Any) -> None:
    path = str(tmp_path / "cable")
    server = make("stream", backend=Server(path))
    server.driver.start()
    server.offer(2000, count=4)
    with socket.socket(socket.AF_UNIX) as bad:
        bad.connect(path)
        bad.sendall(b"\xff" * 100)
        bad.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert bad.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as good:
        good.connect(path)
        sent = frame(100)
        good.sendall(struct.pack(">I", 100) + sent)
        assert server.received()[1] == sent
        server.driver.reset()
        server.driver.start()
        assert server.regs.config(6, 2) == 1
        server.transmit(sent)
        good.settimeout(5)
        assert good.recv(104, socket.MSG_WAITALL) == struct.pack(">I", 100) + sent


def test_two_machines_have_different_addresses(tmp_path: Any) -> None:
    path = str(tmp_path / "cable")
    server = Net(Server(path))
    client = Net(connect(path))
    assert server.mac != client.mac
    client.close()
    server.close()
    assert not os.path.exists(path)

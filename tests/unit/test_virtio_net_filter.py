"""What a network card does not give its guest: filters by mode, address and VLAN, on the commands
of the control queue."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.virtio_net import KINDS, MAC, PLAIN, Card

RX, MACS, VLAN = 0, 1, 2
PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = range(6)
ADD, DEL = 0, 1

OTHER = bytes.fromhex("020000000002")
GROUP = bytes.fromhex("333300000001")
STRANGER = bytes.fromhex("020000000099")
STRANGERS = bytes.fromhex("333300000099")
ALL = b"\xff" * 6


@pytest.fixture(params=KINDS)
def card(request: pytest.FixtureRequest) -> Iterator[Card]:
    card = Card(request.param)
    card.driver.start(wanted=PLAIN)
    yield card
    card.close()


def to(mac: bytes, tag: bytes = b"", size: int = 64) -> bytes:
    head = mac + bytes.fromhex("525400000001") + tag + b"\x88\xb5"
    return head + bytes(size - len(head))


def table(*macs: bytes) -> bytes:
    return struct.pack("<I", len(macs)) + b"".join(macs)


def tagged(mac: bytes, vlan: int) -> bytes:
    return to(mac, b"\x81\0" + struct.pack(">H", 0x6000 | vlan))


def gets(card: Card, *frames: bytes) -> list[bool]:
    """Which of the frames arrive. The last thing sent always does: it is to the card itself."""
    end = to(MAC, size=77)
    card.offer(2000, count=len(frames) + 1)
    for frame in (*frames, end):
        card.send(frame)
    got = [card.received()[1]]
    while got[-1] != end:
        got.append(card.received()[1])
    for _ in range(len(frames) + 1 - len(got)):
        card.send(end)  # into what was not used
        card.received()
    return [frame in got for frame in frames]


def test_everything_until_told_otherwise(card: Card) -> None:
    frames = (to(STRANGER), to(STRANGERS), to(ALL), tagged(STRANGER, 5))
    assert gets(card, *frames) == [True] * 4
    assert card.net.stats()["rx_filtered"] == 0


def test_addresses(card: Card) -> None:
    frames = (to(OTHER), to(GROUP), to(STRANGER), to(STRANGERS), to(ALL))
    assert card.command(MACS, 0, table(OTHER) + table(GROUP)) == 0
    assert gets(card, *frames) == [True] * 5
    assert card.command(RX, PROMISC, b"\0") == 0
    assert gets(card, *frames) == [True, True, False, False, True]
    assert card.net.stats()["rx_filtered"] == 2
    assert card.command(MACS, 0, table() + table()) == 0
    assert gets(card, *frames) == [False, False, False, False, True]
    assert card.command(MACS, 1, OTHER) == 0
    end = to(OTHER, size=77)
    card.offer(2000)
    card.send(to(MAC))
    card.send(end)
    assert card.received()[1] == end
    card.driver.reset()
    card.driver.start(wanted=PLAIN)
    assert gets(card, *frames) == [True] * 5


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [
        ([], [False, False, True]),
        ([ALLMULTI], [False, True, True]),
        ([ALLUNI], [True, False, True]),
        ([ALLUNI, ALLMULTI], [True, True, True]),
        ([ALLMULTI, NOMULTI], [False, False, True]),
        ([NOBCAST], [False, False, False]),
    ],
)
def test_modes(card: Card, modes: list[int], wanted: list[bool]) -> None:
    assert card.command(RX, PROMISC, b"\0") == 0
    for mode in modes:
        assert card.command(RX, mode, b"\1") == 0
    assert gets(card, to(STRANGER), to(STRANGERS), to(ALL)) == wanted


def test_no_unicast(card: Card) -> None:
    assert card.command(RX, PROMISC, b"\0") == 0
    assert card.command(RX, NOUNI, b"\1") == 0
    card.offer(2000)
    card.send(to(MAC))
    card.send(to(ALL))
    assert card.received()[1] == to(ALL)


def test_vlans(card: Card) -> None:
    frames = (tagged(MAC, 5), tagged(MAC, 4095), tagged(MAC, 0), to(MAC))
    assert gets(card, *frames) == [True] * 4
    assert card.command(RX, PROMISC, b"\0") == 0
    assert gets(card, *frames) == [False, False, False, True]
    assert card.command(VLAN, ADD, b"\5\0") == 0
    assert card.command(VLAN, ADD, b"\xff\x0f") == 0
    assert gets(card, *frames) == [True, True, False, True]
    assert card.command(VLAN, DEL, b"\5\0") == 0
    assert gets(card, *frames) == [False, True, False, True]


def test_more_addresses_than_are_kept(card: Card) -> None:
    """All are let through then."""
    assert card.command(RX, PROMISC, b"\0") == 0
    macs = [bytes([2, 0, 0, 0, n >> 8, n & 255]) for n in range(300)]
    assert card.command(MACS, 0, table(*macs[:64]) + table()) == 0
    assert gets(card, to(macs[0]), to(macs[63]), to(STRANGER)) == [True, True, False]
    assert card.command(MACS, 0, table(*macs) + table()) == 0
    assert gets(card, to(macs[299]), to(STRANGER), to(STRANGERS)) == [True, True, False]


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0",
        table(),
        table(OTHER),
        table(OTHER)[:-1] + table(),
        table() + table() + b"\0",
        struct.pack("<I", 2) + OTHER + table(),
        struct.pack("<I", 0xFFFF_FFFF) + OTHER + table(),
        struct.pack("<I", 0x2AAA_AAAB) + OTHER + table(),
        table() + struct.pack("<I", 2) + OTHER,
    ],
)
def test_tables_that_lie_change_nothing(card: Card, data: bytes) -> None:
    assert card.command(RX, PROMISC, b"\0") == 0
    assert card.command(MACS, 0, table(OTHER) + table(GROUP)) == 0
    assert card.command(MACS, 0, data) == 1
    assert gets(card, to(OTHER), to(GROUP), to(STRANGER)) == [True, True, False]


@pytest.mark.parametrize(
    ("group", "command", "data"),
    [(RX, 6, b"\1"), (RX, 0, b"\1\1"), (VLAN, 0, b"\0\x10"), (VLAN, 2, b"\0\0"),
     (VLAN, 0, b"\0"), (MACS, 2, table() + table())],
)  # fmt: skip
def test_commands_that_make_no_sense(card: Card, group: int, command: int, data: bytes) -> None:
    assert card.command(group, command, data) == 1


def test_modes_need_their_features() -> None:
    card = Card("seq")
    try:
        card.driver.start(wanted=PLAIN & ~(1 << 20))
        assert card.command(RX, ALLMULTI, b"\1") == 0
        assert card.command(RX, ALLUNI, b"\1") == 1
    finally:
        card.close()


def test_what_is_filtered_never_reaches_guest_memory() -> None:
    for kind in KINDS:
        card = Card(kind)
        try:
            card.driver.start(wanted=PLAIN)
            assert card.command(RX, PROMISC, b"\0") == 0
            head = card.rx.add([], [500])
            ((at, size),) = card.rx.room(head)
            card.memory.write(at, b"\xa5" * size)
            card.rx.kick()
            for _ in range(20):
                card.send(to(STRANGER, size=400))
            card.send(to(MAC, size=64))
            card.received()
            assert card.memory.read(at + 12 + 64, size - 76) == b"\xa5" * (size - 76)
            assert card.net.stats()["rx_filtered"] == 20
        finally:
            card.close()

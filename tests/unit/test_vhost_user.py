"""The vhost-user front end against a back end written in Python: on both transports, through death
and return."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import vhost_backend
from tests.support.waiting import wait_for
from tests.vhost_backend import BackEnd, reply
from tests.virtio_rig import TRANSPORTS, Rig
from vmm import Machine, MachineConfig
from vmm.devices.virtio import vhost_wire as wire
from vmm.devices.virtio.queue import Chain
from vmm.devices.virtio.vhost_front import FrontEnd
from vmm.devices.virtio.vhost_process import VhostUserDevice
from vmm.devices.virtio.vhost_user import VhostUser
from vmm.devices.virtio.vhost_user_fs import VhostUserFs
from vmm.devices.virtio.vhost_user_net import VhostUserNet
from vmm.devices.virtio.vhost_wire import VhostError
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

KIND = 4
Make = Callable[..., tuple[Rig, BackEnd]]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        yield stack
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "back")


@pytest.fixture
def make(stack: ExitStack, path: str) -> Make:
    """A back end (keywords of BackEnd) and a generic device of two queues (of VhostUser, after
    ``device_``) on a transport."""

    def run(transport: str = "pci", *, packed: bool = False, **options: Any) -> tuple[Rig, BackEnd]:
        mine = {k[7:]: options.pop(k) for k in list(options) if k.startswith("device_")}
        back = BackEnd(path, **options)
        stack.callback(back.close)
        settings = {"queues": 2, "size": 16, "config_size": 16, "timeout": 5.0, **mine}
        device = VhostUser(path, KIND, **settings)
        rig = Rig(device, transport, backing="memfd", packed=packed)
        stack.callback(rig.close)
        return rig, back

    return run


def device_of(rig: Rig) -> VhostUserDevice:
    assert isinstance(rig.device, VhostUserDevice)
    return rig.device


def news_of(rig: Rig) -> list[str]:
    heard: list[str] = []
    device_of(rig).on_news = heard.append
    return heard


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_requests_there_and_back(make: Make, transport: str) -> None:
    rig, back = make(transport)
    rig.driver.start()
    assert rig.regs.device_id() == KIND
    for queue in rig.driver.queues.values():
        for data in (b"abc", bytes(range(200))):
            assert queue.request([data], [300]) == (len(data), data[::-1])
    rig.until(lambda: device_of(rig).interrupts > 0, "an interrupt")
    wait_for(lambda: bool(rig.regs.interrupts() & 1))
    assert back.accepted & vhost_backend.VERSION_1
    assert not rig.broken


@pytest.mark.parametrize("protocol", [0, vhost_backend.REPLY_ACK, vhost_backend.EVERYTHING])
def test_a_reset_gives_the_queues_back(make: Make, protocol: int) -> None:
    rig, back = make(protocol=protocol, device_config_size=0)
    for _ in range(2):
        rig.driver.start()
        assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")
        rig.driver.reset()
        assert not back.rings
    bases = [body for request, body in back.told if request == wire.SET_VRING_BASE]
    assert bases == [wire.STATE.pack(index, 0) for index in (0, 1, 0, 1)]
    assert back.requests().count(wire.GET_VRING_BASE) == 4


def test_old_back_ends_know_no_protocol_features(make: Make) -> None:
    features = vhost_backend.FEATURES & ~vhost_backend.PROTOCOL
    rig, back = make(features=features, device_config_size=0)
    # Such a one has its rings enabled by SET_FEATURES; ours begins them with a kick descriptor.
    begin = back._begin
    do_ring = back._do_ring

    def started(request: int, body: bytes, fds: list[int]) -> bytes | None:
        answer = do_ring(request, body, fds)
        if request == wire.SET_VRING_KICK:
            index, _ = wire.STATE.unpack(body)
            begin(index)
            back.rings[index].enabled = True
        return answer

    back._do_ring = started  # type: ignore[method-assign]
    rig.driver.start()
    assert rig.driver.queues[1].request([b"12"], [2]) == (2, b"21")
    assert wire.GET_PROTOCOL_FEATURES not in back.requests()
    assert wire.SET_VRING_ENABLE not in back.requests()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_configuration_space_is_the_back_ends(make: Make, transport: str) -> None:
    rig, back = make(transport)
    rig.driver.start()
    assert [rig.regs.config(i, 1) for i in range(16)] == list(range(16))
    rig.regs.set_config(4, 2, 0xBEEF)
    assert back.config[4:6] == b"\xef\xbe"
    assert rig.regs.config(4, 2) == 0xBEEF
    before = rig.regs.generation()
    back.config[0] = 77
    back.say(wire.HEADER.pack(wire.BACKEND_CONFIG_CHANGE, wire.VERSION, 0))
    rig.until(lambda: rig.regs.config(0, 1) == 77, "the change")
    assert rig.regs.generation() != before
    assert rig.regs.interrupts() & 2


def test_a_change_before_the_driver_runs_is_told_when_it_does(make: Make) -> None:
    rig, back = make()
    back.config[0] = 77
    back.say(wire.HEADER.pack(wire.BACKEND_CONFIG_CHANGE, wire.VERSION, 0))
    rig.until(lambda: rig.device.config[0] == 77, "the change")
    rig.driver.start()
    assert rig.regs.config(0, 1) == 77


def test_features_are_those_of_both(make: Make) -> None:
    foreign = 1 << 26 | 1 << 33 | 1 << 36 | 1 << 38 | 1 << 34
    rig, back = make(features=vhost_backend.FEATURES | foreign | 1 << 5 | 1 << 51)
    offered = rig.driver.negotiate()
    assert offered & ~(1 << 29 | 1 << 28 | 1 << 32) == 1 << 5 | 1 << 51
    rig.driver.reset()
    rig.driver.start(wanted=1 << 32 | 1 << 5)
    assert back.accepted == 1 << 32 | 1 << 5 | vhost_backend.PROTOCOL


def test_packed_rings_only_if_both_have_them(make: Make) -> None:
    rig, back = make(packed=True, features=vhost_backend.FEATURES | 1 << 34)
    features = rig.driver.negotiate()
    assert features >> 34 & 1
    rig.driver.setup_queue(0)
    back.lies[wire.SET_VRING_ENABLE] = lambda body: reply(wire.SET_VRING_ENABLE, bytes(8))
    rig.regs.status = 15
    bases = [body for request, body in back.told if request == wire.SET_VRING_BASE]
    assert bases == [wire.STATE.pack(0, 0x8000_8000)]


def test_packed_is_not_offered_for_a_back_end_without(make: Make) -> None:
    rig, _ = make(packed=True)
    assert not rig.driver.negotiate() >> 34 & 1


def test_memory_is_named_by_guest_addresses_alone(make: Make) -> None:
    rig, back = make()
    rig.driver.start()
    body = next(body for request, body in back.told if request == wire.SET_MEM_TABLE)
    for r in rig.memory.ranges:
        assert r.hva.to_bytes(8, "little") not in body
    assert len(body) == 8 + 32 * len(rig.memory.ranges)


def test_a_queue_alone_is_reset(make: Make) -> None:
    rig, back = make(features=vhost_backend.FEATURES | 1 << 40)
    rig.driver.start()
    assert rig.driver.queues[1].request([b"12"], [2]) == (2, b"21")
    assert rig.regs.reset_queue(1)
    assert list(back.rings) == [0]
    assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")
    assert rig.driver.setup_queue(1).request([b"34"], [2]) == (2, b"43")


# ---- death and return ---------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_death_needs_a_reset_and_a_reset_looks_again(make: Make, transport: str) -> None:
    rig, back = make(transport)
    news = news_of(rig)
    rig.driver.start()
    back.die()
    rig.until_broken()
    assert news == [f"vhost-user0: vhost-user back end {back.path} closed the connection"]
    assert device_of(rig).faults() == news
    rig.driver.start()  # a new one listens
    assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")
    assert not device_of(rig).faults()


def test_without_a_back_end_a_driver_is_told_at_once(make: Make) -> None:
    rig, back = make()
    news = news_of(rig)
    os.unlink(back.path)
    back.die()
    rig.until(lambda: not device_of(rig).connected, "its end")
    rig.driver.negotiate()
    rig.driver.setup_queue(0)
    rig.regs.status = 15
    assert rig.broken
    assert len(news) == 2
    assert "No such file" in news[1]


def keep_all_but(first: int) -> Callable[[int, Chain], bytes | None]:
    """Answers so many, then keeps what comes."""
    left = [first]

    def handle(index: int, chain: Chain) -> bytes | None:
        left[0] -= 1
        return chain.read(100)[::-1] if left[0] >= 0 else None

    return handle


def answer(index: int, chain: Chain) -> bytes | None:
    return chain.read(100)[::-1]


@pytest.mark.parametrize("protocol", [vhost_backend.EVERYTHING, vhost_backend.MQ])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_new_back_end_finishes_what_the_old_one_left(
    make: Make, transport: str, protocol: int
) -> None:
    rig, back = make(
        transport, protocol=protocol, handle=keep_all_but(2), device_reconnect=0.1,
        device_config_size=0,
    )  # fmt: skip
    news = news_of(rig)
    rig.driver.start()
    queue = rig.driver.queues[0]
    heads = [queue.add([bytes([n, 100])], [2]) for n in range(5)]
    queue.kick()
    wait_for(lambda: len(back.kept) == 3)
    back.handle = answer
    back.die()
    got = [queue.wait() for _ in range(5)]
    assert got == [(head, 2, bytes([100, n])) for n, head in enumerate(heads)]
    assert device_of(rig).connections == back.connections == 2
    assert queue.request([b"12"], [2]) == (2, b"21")
    assert not rig.broken
    wait_for(lambda: [line.rpartition(" ")[2] for line in news] == ["connection", "back"])


def test_what_was_finished_but_not_told_is_told(make: Make) -> None:
    rig, back = make(device_reconnect=0.1)
    rig.driver.start()
    queue = rig.driver.queues[0]
    back._interrupt = lambda index: None  # type: ignore[method-assign]
    queue.add([b"12"], [2])
    queue.kick()
    assert queue.wait()[2] == b"21"
    assert not rig.regs.interrupts() & 1
    back.die()
    rig.until(lambda: bool(rig.regs.interrupts() & 1), "an interrupt")


def out_of_order(rig: Rig, back: BackEnd) -> None:
    """Three requests, the second is finished, and the back end dies."""
    rig.driver.start()
    queue = rig.driver.queues[0]
    for _ in range(3):
        queue.add([b"12"], [2])
    queue.kick()
    wait_for(lambda: len(back.kept) == 3)
    back.finish(1, b"21")
    queue.wait()
    back.handle = answer
    back.die()


def test_what_cannot_be_taken_up_needs_a_reset(make: Make) -> None:
    """Answers came out of order, and nobody kept track: nothing is done twice."""
    protocol = vhost_backend.EVERYTHING & ~vhost_backend.INFLIGHT
    rig, back = make(protocol=protocol, handle=lambda *_: None, device_reconnect=0.1)
    news = news_of(rig)
    out_of_order(rig, back)
    rig.until_broken()
    assert "cannot be taken up" in news[-1]
    assert rig.driver.queues[0].take() is None
    rig.driver.start()
    assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")


def test_who_keeps_track_of_requests_gets_that_back(make: Make) -> None:
    rig, back = make(handle=lambda *_: None, device_reconnect=0.1)
    out_of_order(rig, back)
    wait_for(lambda: len(back.inflight_inodes) == 3)
    got, first, second = back.inflight_inodes
    assert got == first == second
    assert not rig.broken
    rig.driver.reset()
    rig.driver.start()
    assert back.inflight_inodes[3] != got


def test_a_lesser_back_end_is_not_taken(make: Make) -> None:
    rig, back = make(device_reconnect=0.1)
    rig.driver.start()
    back.features &= ~(1 << 29)
    back.die()
    wait_for(lambda: back.connections >= 3)
    assert not device_of(rig).connected
    back.features |= 1 << 29
    assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")


def test_a_driver_may_come_before_the_back_end_is_back(make: Make) -> None:
    rig, back = make(device_reconnect=0.1)
    back.lies[wire.GET_FEATURES] = lambda body: reply(wire.GET_FEATURES, b"?")
    back.die()
    rig.until(lambda: not device_of(rig).connected, "its end")
    rig.driver.start()
    queue = rig.driver.queues[0]
    queue.add([b"12"], [2])
    queue.kick()
    assert not rig.broken
    back.lies = {}
    assert queue.wait()[2] == b"21"


# ---- what cannot be ------------------------------------------------------------------------


def test_nobody_listens(path: str) -> None:
    with pytest.raises(VhostError, match=r"cannot connect to .*No such file.*start the back end"):
        VhostUser(path, KIND)


def test_a_machine_shares_its_memory_by_itself(path: str) -> None:
    for options, shared in (({"vhost_user": f"{path},id=4"}, True), ({}, False)):
        memory = Machine(kernel="x", memory="16M", **options)._build_memory()
        assert (memory.fd >= 0) == shared
        memory.close()


@pytest.mark.parametrize(
    "text",
    ["", "id=4", "s,id=0", "s,id=64", "s,id=4,queues=0", "s,id=4,queue-size=3",
     "s,id=4,config-size=257", "s,id=4,reconnect=0.01", "s,id=4,reconnect=-1", "s"],
)  # fmt: skip
def test_options_that_are_wrong(text: str) -> None:
    with pytest.raises(ConfigError):
        MachineConfig(vhost_user=text)


def test_private_memory(stack: ExitStack, path: str) -> None:
    back = BackEnd(path)
    stack.callback(back.close)
    device = VhostUser(path, KIND)
    stack.callback(device.close)
    memory = GuestMemory([(0, 1 << 20)])
    stack.callback(memory.close)
    with pytest.raises(ConfigError, match="--memory-backing"):
        device.attach(memory, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"queues": 3}, "has 2 at most"), ({"config_size": 17}, "did not give the 17 bytes")],
)
def test_more_than_the_back_end_has(
    stack: ExitStack, path: str, options: dict[str, int], said: str
) -> None:
    back = BackEnd(path)
    stack.callback(back.close)
    with pytest.raises((ConfigError, VhostError), match=said):
        VhostUser(path, KIND, **options)


def test_legacy_back_ends_are_refused(stack: ExitStack, path: str) -> None:
    back = BackEnd(path, features=vhost_backend.PROTOCOL)
    stack.callback(back.close)
    with pytest.raises(VhostError, match="VERSION_1"):
        VhostUser(path, KIND)


# ---- the named ones ------------------------------------------------------------------------


def test_fs_has_its_tag(stack: ExitStack, path: str) -> None:
    back = BackEnd(path)
    stack.callback(back.close)
    rig = Rig(VhostUserFs(path, "work", size=16), "mmio", backing="memfd")
    stack.callback(rig.close)
    rig.driver.start()
    tag = bytes(rig.regs.config(i, 1) for i in range(36))
    assert (tag.rstrip(b"\0"), rig.regs.config(36, 4)) == (b"work", 1)
    assert [len(rig.driver.queues), rig.regs.device_id()] == [2, 26]
    assert rig.driver.queues[1].request([b"12"], [2]) == (2, b"21")
    with pytest.raises(ConfigError, match="1 to 36 bytes"):
        VhostUserFs(path, "x" * 37)


def test_net_link_is_down_while_nobody_moves_frames(stack: ExitStack, path: str) -> None:
    back = BackEnd(path, features=vhost_backend.FEATURES | 1 | 1 << 15 | 1 << 17 | 1 << 22)
    stack.callback(back.close)
    mac = bytes.fromhex("525400000001")
    rig = Rig(VhostUserNet(path, mac=mac, size=16, reconnect=0.1), "pci", backing="memfd")
    stack.callback(rig.close)
    features = rig.driver.start()
    assert features & 0xFFFFFF == 1 | 1 << 5 | 1 << 15 | 1 << 16
    assert not back.accepted & (1 << 5 | 1 << 16)
    assert bytes(rig.regs.config(i, 1) for i in range(6)) == mac
    assert rig.regs.config(6, 2) == 1
    back.lies[wire.GET_FEATURES] = lambda body: reply(wire.GET_FEATURES, b"?")
    back.die()
    rig.until(lambda: rig.regs.config(6, 2) == 0, "the end of the link")
    back.lies = {}
    rig.until(lambda: rig.regs.config(6, 2) == 1, "its return")
    assert rig.driver.queues[1].request([b"12"], [2]) == (2, b"21")


def test_net_pairs_are_the_drivers_to_use(stack: ExitStack, path: str) -> None:
    back = BackEnd(path, queues=3)
    stack.callback(back.close)
    with pytest.raises(ConfigError, match="queues=4: it has 3 at most"):
        VhostUserNet(path, queues=4)
    rig = Rig(VhostUserNet(path, queues=3, size=16), "pci", backing="memfd")
    stack.callback(rig.close)
    features = rig.driver.start()
    assert features >> 17 & features >> 22 & 1
    assert rig.regs.config(8, 2) == 3
    assert len(rig.driver.queues) == 7

    def enabled() -> list[int]:
        return [index for index, ring in sorted(back.rings.items()) if ring.enabled]

    assert sorted(back.rings) == [0, 1, 2, 3, 4, 5]
    wait_for(lambda: enabled() == [0, 1])
    control = rig.driver.queues[6]
    for pairs, answer, rings in ((3, 0, 6), (0, 1, 6), (4, 1, 6), (2, 0, 4)):
        assert control.request([b"\4\0", bytes([pairs, 0])], [1]) == (1, bytes([answer]))
        wait_for(lambda rings=rings: enabled() == list(range(rings)))  # type: ignore[misc]
    assert enabled() == [0, 1, 2, 3]
    assert rig.driver.queues[3].request([b"12"], [2]) == (2, b"21")
    # Without MQ the third queue controls.
    rig.driver.negotiate(((1 << 64) - 1) & ~(1 << 22))
    queues = [rig.driver.setup_queue(index) for index in range(3)]
    rig.regs.status = 15
    assert sorted(back.rings) == enabled() == [0, 1]
    assert queues[2].request([b"\4\0", b"\1\0"], [1]) == (1, b"\1")
    assert queues[1].request([b"12"], [2]) == (2, b"21")


def test_front_end_closes_what_it_opened(stack: ExitStack, path: str) -> None:
    back = BackEnd(path)
    stack.callback(back.close)
    front = FrontEnd(path, "it", 5.0)
    assert front.queues == 2
    front.close()

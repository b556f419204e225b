"""Drivers and back ends that come, go and meddle in any order: in the end a request is answered,
and nothing is left open."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import vhost_backend
from tests.vhost_backend import BackEnd
from tests.virtio_rig import TRANSPORTS, Rig
from vmm.devices.virtio import vhost_wire as wire
from vmm.devices.virtio.vhost_user import VhostUser

STEPS = (
    "start", "start one", "request", "many", "reset", "die", "keep", "answer", "change", "write",
    "kick", "reset queue", "noise",
)  # fmt: skip

SIZE = 16


class World:
    """A device, its driver and its back end, to which things happen."""

    def __init__(self, stack: ExitStack, transport: str, protocol: int, reconnect: float) -> None:
        home = stack.enter_context(tempfile.TemporaryDirectory())
        features = vhost_backend.FEATURES | 1 << 40
        self.back = BackEnd(f"{home}/back", self.handle, features=features, protocol=protocol)
        stack.callback(self.back.close)
        self.keep = False
        size = 16 if protocol & vhost_backend.CONFIG else 0
        device = VhostUser(
            self.back.path, 4, queues=2, size=SIZE, config_size=size, reconnect=reconnect
        )
        self.rig = Rig(device, transport, backing="memfd")
        stack.callback(self.rig.close)

    def handle(self, index: int, chain: object) -> bytes | None:
        return None if self.keep else b"ok"

    def do(self, step: str) -> None:
        rig, driver, back = self.rig, self.rig.driver, self.back
        if step in ("start", "start one"):
            driver.reset()
            driver.start(0 if step == "start" else 1)
        elif step in ("request", "many"):
            for queue in driver.queues.values():
                for _ in range(1 if step == "request" else 5):
                    if len(queue.free) >= 2:
                        queue.add([b"12"], [2])
                queue.kick()
        elif step == "reset":
            driver.reset()
        elif step == "die":
            back.die()
        elif step in ("keep", "answer"):
            self.keep = step == "keep"
        elif step == "change" and back._channel is not None:
            head = wire.HEADER.pack(wire.BACKEND_CONFIG_CHANGE, wire.VERSION, 0)
            self.say(lambda: back._channel, head)
        elif step == "write" and rig.device.config:
            rig.regs.set_config(3, 1, 9)
        elif step == "kick":
            for index in range(4):
                rig.regs.notify(index)
        elif step == "reset queue" and 0 in driver.queues:
            rig.regs.reset_queue(0)
            driver.queues.pop(0)
        elif step == "noise" and back._front is not None:
            self.say(lambda: back._front, b"\xff" * 40)

    def say(self, sock: Callable[[], socket.socket | None], data: bytes) -> None:
        """On the back end's thread, and to whoever still listens."""

        def send() -> None:
            there = sock()
            if there is not None:
                with suppress(OSError):
                    there.send(data)

        self.back.call(send)


@pytest.mark.parametrize("transport", TRANSPORTS)
@given(
    steps=st.lists(st.sampled_from(STEPS), max_size=15),
    protocol=st.sampled_from([0, vhost_backend.REPLY_ACK, vhost_backend.EVERYTHING]),
    reconnect=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=40)
def test_all_ends_well(transport: str, steps: list[str], protocol: int, reconnect: float) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        world = World(stack, transport, protocol, reconnect)
        for step in steps:
            world.do(step)
        world.keep = False
        rig = world.rig
        for _ in range(3):
            rig.driver.reset()
            rig.driver.start()
            if not rig.broken:
                break
        queue = rig.driver.queues[1]
        assert queue.request([b"12"], [2]) == (2, b"ok")
    assert len(os.listdir("/proc/self/fd")) == before

"""What is asked of the kernel's vhost, and what cannot be. The devices themselves: tests/boot."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmm.board import Board
from vmm.catalog import parse
from vmm.config import MachineConfig
from vmm.devices.virtio.vhost_kernel import Vhost
from vmm.devices.virtio.vhost_vsock import VhostVsock
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory


@pytest.fixture
def board() -> Iterator[Board]:
    memory = GuestMemory([(0, 1 << 20)])
    board = Board(MachineConfig(kernel="x"), memory, IrqChip())
    yield board
    board.close()
    memory.close()


@pytest.fixture
def nothing_open() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("net,tap,vhost=on,pcap=/tmp/x", "no dump, no limits"),
        ("net,tap,vhost=on,rx-frames=5", "no dump, no limits"),
        ("net,user,vhost=on", "vhost belongs to --net tap"),
        ("vsock,cid=3,vhost,path=/tmp/x", "makes no socket"),
    ],
)
def test_what_does_not_go_together(board: Board, nothing_open: None, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(text).build("it0", board)


@pytest.mark.skipif(os.path.exists("/dev/vhost-vsock"), reason="this host has it")
def test_the_module_is_named(board: Board, nothing_open: None) -> None:
    with pytest.raises(HostError, match=r"/dev/vhost-vsock .*No such file.*modprobe vhost_vsock"):
        parse("vsock,cid=3,vhost").build("vsock0", board)


def test_what_is_no_vhost_device(nothing_open: None) -> None:
    with pytest.raises(HostError, match="/dev/null cannot be used: Inappropriate ioctl"):
        Vhost("/dev/null", "--test")


def test_without_it_nothing_changes(board: Board) -> None:
    device = parse("vsock,cid=3").build("vsock0", board)
    assert isinstance(device, Vsock)
    assert not isinstance(device, VhostVsock)
    device.close()

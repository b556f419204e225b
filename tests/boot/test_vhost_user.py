"""Linux on devices that other processes serve: a disk of qemu-storage-daemon's, a directory of
virtiofsd's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.back_ends import file_daemon, storage_daemon
from tests.boot.conftest import UP, Boot
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from tests.support.waiting import wait_for
from vmm import Machine
from vmm.devices.virtio.vhost_user_blk import VhostUserBlk
from vmm.guest.modules import ModuleTree

MIB = 1 << 20

transports = pytest.mark.parametrize("transport", ["pci", "mmio"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(8 * MIB))
    return path


DISK = """\
echo "size=$(cat /sys/block/vda/size)"
echo "queues=$(ls /sys/block/vda/mq | wc -l)"
echo "sum=$(sha256sum /dev/vda | cut -d' ' -f1)"
dd if=/dev/urandom of=/tmp/new bs=64k count=32 2>/dev/null
for i in 1 2 3; do
  dd if=/tmp/new of=/dev/vda bs=64k seek=8 conv=fsync 2>/dev/null || echo "wrote=no"
  echo 3 > /proc/sys/vm/drop_caches
  dd if=/dev/vda of=/tmp/back bs=64k skip=8 count=32 2>/dev/null
  cmp /tmp/new /tmp/back || echo "wrote=no"
done
echo "new=$(sha256sum /tmp/new | cut -d' ' -f1)"
"""


@transports
def test_disk(boot: Boot, image: Path, transport: str) -> None:
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    with storage_daemon(image, queues=2) as daemon:
        option = f"{daemon.path},queues=2"
        booted = boot(DISK, vhost_user_blk=option, transport=transport, cpus=2).ok()
        assert booted.value("size") == str(8 * MIB // 512)
        assert booted.value("queues") == "2"
        assert booted.value("sum") == before
        assert "wrote=no" not in booted.console
        written = image.read_bytes()[8 * 65536 : 40 * 65536]
        assert hashlib.sha256(written).hexdigest() == booted.value("new")


FILES = """\
mount -t virtiofs work /mnt || echo "mount=no"
echo "sum=$(sha256sum /mnt/data | cut -d' ' -f1)"
dd if=/dev/urandom of=/mnt/new bs=64k count=32 2>/dev/null
echo "new=$(sha256sum /mnt/new | cut -d' ' -f1)"
mkdir /mnt/inner && echo text > /mnt/inner/file && mv /mnt/inner /mnt/moved
umount /mnt
"""


@pytest.fixture
def with_modules() -> Callable[..., str]:
    def make(script: str, *modules: str) -> str:
        tree = kernel_tree()
        missing = [m for m in modules if not ModuleTree(tree.modules_dir).has(m)]
        if missing:
            pytest.skip(f"the cloud kernel has no module {missing[0]}")
        names = (*VIRTIO_MODULES, *modules)
        return str(build(f'echo "{UP}"\n{script}\npoweroff -f', tree, modules=names))

    return make


@transports
def test_directory(
    boot: Boot, with_modules: Callable[..., str], tmp_path: Path, transport: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    data = os.urandom(3 * MIB)
    (shared / "data").write_bytes(data)
    initrd = with_modules(FILES, "virtiofs")
    with file_daemon(shared, tmp_path) as daemon:
        booted = boot(
            initrds=[initrd], vhost_user_fs=f"{daemon.path},tag=work", transport=transport
        ).ok()
    assert booted.value("sum") == hashlib.sha256(data).hexdigest(), booted.report()
    new = (shared / "new").read_bytes()
    assert len(new) == 2 * MIB
    assert hashlib.sha256(new).hexdigest() == booted.value("new")
    assert (shared / "moved" / "file").read_text() == "text\n"


AGAIN = f"""\
echo "{UP}"
dd if=/dev/vda iflag=direct bs=4k of=/dev/null count=1 2>/dev/null || echo "direct=no"
echo "vmm-guest: go"
for i in 1 2 3; do
  echo "sum$i=$(dd if=/dev/vda iflag=direct bs=128k 2>/dev/null | sha256sum | cut -d' ' -f1)"
done
poweroff -f
"""


@transports
def test_disk_goes_on_when_its_server_is_killed(kernel: str, image: Path, transport: str) -> None:
    """The guest reads; its disk's server is killed, and another one started."""
    sum_of = hashlib.sha256(image.read_bytes()).hexdigest()
    with (
        storage_daemon(image) as daemon,
        Machine(
            kernel=kernel,
            initrds=[str(build(AGAIN, kernel_tree()))],
            append="quiet",
            memory="256M",
            vhost_user_blk=f"{daemon.path},reconnect=0.2",
            transport=transport,
            timeout=BOOT_TIMEOUT,
        ) as vm,
    ):
        vm.console.expect("vmm-guest: go", timeout=BOOT_TIMEOUT)
        count_boot()
        device = next(d for d in vm.devices if isinstance(d, VhostUserBlk))
        daemon.kill()
        wait_for(lambda: not device.connected)
        daemon.start()
        result = vm.wait()
    assert result.reason == "poweroff", result.console
    assert "direct=no" not in result.console
    for nr in (1, 2, 3):
        assert f"sum{nr}={sum_of}" in result.console
    assert device.connections == 2

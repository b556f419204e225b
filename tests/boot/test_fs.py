"""Linux's virtiofs on vmm's shares, on both transports."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.boot.conftest import UP, Boot

MODULES = (*VIRTIO_MODULES, "virtiofs")

SCRIPT = f"""\
echo "{UP}"
mkdir /mnt/a /mnt/b
mount -t virtiofs fs0 /mnt/a || echo "mount failed"
mount -t virtiofs data /mnt/b || echo "mount failed"
cd /mnt/a
echo "read=$(cat hello)"
echo "listed=$(ls | wc -l) $(ls many | wc -l)"
echo "sum=$(sha256sum big | cut -d' ' -f1)"
echo "from the guest" > new
cat big > copy
mkdir -p one/two/three
mv new one/two/three/moved
ln -s ../hello one/link
ln copy hard
rm -r many
echo "link=$(cat one/link)"
echo "appended" >> hello
sync
echo "again=$(cat hello | wc -l)"
cd /mnt/b
echo "ro=$(cat hello)"
touch x 2>/dev/null && echo "wrote to a read-only share"
cd /
umount /mnt/a && umount /mnt/b && echo "umount=ok"
poweroff -f
"""


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_two_shares(boot: Boot, tmp_path: Path, transport: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    big = os.urandom(5 << 20)
    (one / "big").write_bytes(big)
    (one / "many").mkdir()
    for i in range(1000):
        (one / "many" / f"file {i}").write_bytes(b"x" * i)
    for share in (one, two):
        (share / "hello").write_text("hello from the host\n")
    initrd = build(SCRIPT, kernel_tree(), modules=MODULES)
    booted = boot(
        initrds=[str(initrd)],
        fs=[f"{one}", f"{two},tag=data,ro,cache=always"],
        transport=transport,
    ).ok()
    assert "failed" not in booted.console, booted.report()
    assert booted.value("read") == booted.value("ro") == "hello from the host"
    assert booted.value("listed") == "3 1000"
    assert booted.value("sum") == hashlib.sha256(big).hexdigest()
    assert booted.value("link") == "hello from the host"
    assert booted.value("again") == "2"
    assert booted.value("umount") == "ok"
    assert "read-only share" not in booted.console, booted.report()
    assert sorted(p.name for p in one.iterdir()) == ["big", "copy", "hard", "hello", "one"]
    assert (one / "copy").read_bytes() == big
    assert (one / "hard").samefile(one / "copy")
    assert (one / "one/two/three/moved").read_text() == "from the guest\n"
    assert (one / "hello").read_text() == "hello from the host\nappended\n"
    assert sorted(p.name for p in two.iterdir()) == ["hello"]

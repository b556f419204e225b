"""The Image of arm64 and riscv64: what is loaded where, and what is refused in which words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, kernels
from vmm.arch import image
from vmm.arch.image import Image, open_image
from vmm.arch.source import Source
from vmm.errors import BootError
from vmm.memory import GuestMemory

MIB = 1 << 20
BASE = 0x4000_0000
RAM = 16 * MIB
NAMES = sorted(images.FORMATS)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made = GuestMemory([(BASE, RAM)])
    yield made
    made.close()


def opened(data: bytes, name: str) -> Image:
    return open_image(Source.open(data, "kernel"), images.FORMATS[name][0])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_put_at_its_offset(memory: GuestMemory, name: str) -> None:
    data = images.make(name, text_offset=4 * MIB, size=5 * MIB)
    found = opened(data, name)
    assert found.load(memory, BASE) == (BASE + 4 * MIB, BASE + 9 * MIB)
    assert memory.read(BASE + 4 * MIB, len(data) + 1) == data + b"\0"
    assert name in found.description


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", sorted(images.PACKERS))
@pytest.mark.parametrize("form", ["packed", "zboot", "packed zboot"])
def test_every_packing(memory: GuestMemory, name: str, kind: str, form: str) -> None:
    data = images.make(name, size=2 * MIB)
    pack = images.PACKERS[kind]
    made = images.zboot(pack(data)) if "zboot" in form else data
    made = pack(made) if "packed" in form else made
    found = opened(made, name)
    assert found.source.size == len(data)
    start, _ = found.load(memory, BASE)
    assert memory.read(start, len(data)) == data
    found.source.close()


def test_the_file_is_closed_by_who_opened_it(tmp_path: Path) -> None:
    path = tmp_path / "Image.gz"
    path.write_bytes(images.PACKERS["gzip"](images.PACKERS["gzip"](images.make("arm64"))))
    before = len(os.listdir("/proc/self/fd"))
    with Source.open(path, "kernel") as source:
        found = open_image(source, image.ARM64)
        assert found.source is not source
        assert source.fd >= 0
        found.source.close()
    path.write_bytes(images.PACKERS["gzip"](images.PACKERS["gzip"](b"no kernel" * 100)))
    with Source.open(path, "kernel") as source, pytest.raises(BootError, match="is text, not a"):
        open_image(source, image.ARM64)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_follows_the_kernel_in_the_file_is_not_loaded(memory: GuestMemory) -> None:
    data = images.make("arm64", size=4096)
    opened(data, "arm64").load(memory, BASE)
    assert memory.read(BASE, 4096) == data[:4096]
    assert not any(memory.read(BASE + 4096, 4096))


def test_kernels_before_3_17_have_no_size(memory: GuestMemory) -> None:
    data = images.make("arm64", size=0, text_offset=0x1234)
    assert opened(data, "arm64").load(memory, BASE) == (
        BASE + 0x8_0000,
        BASE + 0x8_0000 + len(data),
    )


def test_headers_before_0_2_have_one_magic(memory: GuestMemory) -> None:
    data = images.make("RISC-V", magic2=bytes(4))
    assert opened(data, "RISC-V").load(memory, BASE)[0] == BASE + 2 * MIB


def test_all_of_the_ram_will_do_and_a_byte_more_will_not(memory: GuestMemory) -> None:
    opened(images.make("arm64", size=RAM), "arm64").load(memory, BASE)
    with pytest.raises(BootError, match="needs 17 MiB of RAM to start in and the guest has 16 MiB"):
        opened(images.make("arm64", size=RAM + 1), "arm64").load(memory, BASE)
    with pytest.raises(BootError, match=r"needs 18 MiB .*; give it more with --memory"):
        opened(images.make("RISC-V", size=RAM), "RISC-V").load(memory, BASE)


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (images.make("arm64", flags=1), "arm64", "big-endian kernel for arm64, and only little"),
        (images.make("RISC-V", flags=1), "RISC-V", "big-endian kernel for RISC-V"),
        (images.make("RISC-V", size=0), "RISC-V", "damaged header: it does not say how much"),
        (images.make("arm64", size=(1 << 30) + 1), "arm64", "damaged .* to need 1073741825 bytes"),
        (
            images.make("arm64", text_offset=0x800),
            "arm64",
            "offset is 0x800, .* multiple of 0x1000",
        ),
        (images.make("RISC-V", text_offset=0x8000), "RISC-V", "0x8000, .* multiple of 0x200000"),
        (images.make("arm64", text_offset=1 << 63), "arm64", "text offset is 0x8000000000000000"),
        (images.make("arm64")[:63], "arm64", "63 bytes long, too short"),
        (
            images.make("arm64", magic2=b"arm\x64"),
            "arm64",
            "is an EFI program, .* not a kernel Image",
        ),
        (
            images.make("arm64"),
            "RISC-V",
            "is a kernel Image for arm64, and this machine runs kernels for RISC-V; "
            "'qemu-system-aarch64 -M virt -cpu max -m 512 -kernel FILE'",
        ),
        (images.make("RISC-V"), "arm64", "Image for RISC-V, .* for arm64; 'qemu-system-riscv64"),
        (kernels.bzimage(), "arm64", "is a bzImage for x86-64, .* for arm64; 'qemu-system-x86_64"),
        (kernels.vmlinux(), "RISC-V", "is an ELF file for x86-64, .* for RISC-V"),
        (
            images.PACKERS["gzip"](images.make("RISC-V")),
            "arm64",
            "is a kernel Image for RISC-V, .* for arm64",
        ),
        (
            images.zboot(b"\1\2\3\4", b"new"),
            "arm64",
            r"packed in a way that is not known \('new'\)",
        ),
        (images.zboot(b"")[:-64], "arm64", "truncated: its packed kernel is 0 bytes"),
        (
            images.zboot(images.PACKERS["gzip"](images.make("arm64")))[:0x210],
            "arm64",
            "truncated: its packed kernel is .* at 0x200 and the file has 0x210",
        ),
        (images.PACKERS["gzip"](b""), "arm64", "nothing but empty gzip data"),
    ],
)
def test_refusals(data: bytes, name: str, words: str) -> None:
    with pytest.raises(BootError, match=words):
        opened(data, name)


def test_a_file_that_unpacks_without_end_is_stopped() -> None:
    bomb = images.PACKERS["gzip"](bytes(17 << 20))
    with pytest.raises(BootError, match=r"unpacks .* to more than"):
        opened(bomb, "arm64")

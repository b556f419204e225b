"""The loaders against what they were written for: Debian's kernels, and Linux's own header."""

from __future__ import annotations

import glob
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vmm.arch.x86_64 import bootparams, layout
from vmm.arch.x86_64.boot import load_kernel
from vmm.memory import GuestMemory

MIB = 1 << 20
CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
FETCHED = os.path.join(CACHE, "vmm", "kernel-packages", "*", "boot", "vmlinuz-*")
KERNELS = [k for k in os.environ.get("VMM_TEST_KERNELS", "").split(":") if k] or sorted(
    glob.glob(FETCHED)
)
PARAMS: list[str | None] = [*KERNELS] or [None]


@pytest.fixture(params=PARAMS, ids=lambda path: os.path.basename(path or "none"))
def kernel(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param is None:
        pytest.skip(f"no kernel in {FETCHED} and VMM_TEST_KERNELS is not set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return str(request.param)


@pytest.mark.parametrize("protocol", ["bzimage", "elf", "pvh"])
def test_debian_kernel(kernel: str, protocol: str) -> None:
    memory = GuestMemory(layout.ram_ranges(128 * MIB))
    initrd = os.urandom(5 * MIB)
    version = os.path.basename(kernel).removeprefix("vmlinuz-")
    try:
        for _ in range(2):  # the second time from the cache
            state = load_kernel(memory, kernel, protocol=protocol, initrds=[initrd])
            assert state.kind == protocol
            assert version in state.description
            start, end = state.kernel
            assert start <= state.entry < end
            ((gpa, size),) = state.initrd
            assert gpa >= end
            assert memory.read(gpa, size) == initrd
            banner = f"Linux version {version} ".encode()
            # lz4 may leave it legible in a bzImage too.
            legible = memory.read(start, end - start).find(banner) >= 0
            assert legible or protocol == "bzimage"
    finally:
        memory.close()


def test_a_truncated_debian_kernel(kernel: str) -> None:
    from vmm.errors import BootError

    data = Path(kernel).read_bytes()
    memory = GuestMemory(layout.ram_ranges(128 * MIB))
    for part in (1, 0x1F0, 0x210, 0x290, 5000, len(data) // 2, len(data) - 100_000):
        with pytest.raises(BootError):
            load_kernel(memory, data[:part])
    memory.close()


def test_offsets_are_those_of_linux(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to read asm/bootparam.h with")
    names = {
        name: name if offset < bootparams.HEADER else f"hdr.{name}"
        for name, (offset, _) in bootparams.FIELDS.items()
    }
    rows = "".join(
        f'R("{name}", offsetof(struct boot_params, {path}),'
        f" sizeof(((struct boot_params *)0)->{path}));\n"
        for name, path in {**names, "e820_table": "e820_table"}.items()
    )
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <asm/bootparam.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        '#define R(n, o, s) printf("%s %zu %zu\\n", n, (size_t)(o), (size_t)(s))\n'
        f"int main(void)\n{{\n{rows}"
        'R("", sizeof(struct boot_params), sizeof(struct boot_e820_entry));\n}\n'
    )
    subprocess.run([compiler, "-o", tmp_path / "offsets", source], check=True)
    out = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True)
    found = {}
    for line in out.stdout.splitlines():
        name, offset, size = line.rsplit(" ", 2)
        found[name] = int(offset), int(size)
    assert found.pop("") == (bootparams.SIZE, struct.calcsize("<QQI"))
    assert found.pop("e820_table")[0] == bootparams.E820_TABLE
    assert found == bootparams.FIELDS

"""Where a run happens, and what is handed to the appliance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import kernels
from vmm.arch.x86_64 import host
from vmm.cli import accel
from vmm.config import MachineConfig
from vmm.errors import HostError


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host with a usable /dev/kvm and no vmx or svm."""
    monkeypatch.delenv(accel.NESTED, raising=False)
    monkeypatch.setattr(host, "extension", lambda: "")
    monkeypatch.setattr(accel, "DEV_KVM", os.devnull)
    return monkeypatch


def config(tmp_path: Path, image: bytes, **options: Any) -> MachineConfig:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(image)
    return MachineConfig(kernel=kernel, **options)


BZIMAGE = kernels.bzimage(kernels.payload("gzip", kernels.vmlinux()))


@pytest.mark.parametrize(
    ("image", "boot", "linux"),
    [
        (BZIMAGE, "auto", True),
        (kernels.vmlinux(), "auto", True),
        (kernels.payload("xz", kernels.vmlinux()), "auto", True),
        (kernels.multiboot_elf(), "auto", False),
        (b"\xf4" * 100, "flat", False),
        (BZIMAGE, "flat", False),
        (b"no kernel", "auto", False),
        (b"\x7fELF", "auto", False),
        (b"", "auto", False),
    ],
)
def test_what_is_linux(tmp_path: Path, image: bytes, boot: str, linux: bool) -> None:
    assert accel.is_linux(config(tmp_path, image, boot=boot)) is linux


def test_a_missing_kernel_is_refused_here_and_at_once(here: pytest.MonkeyPatch) -> None:
    assert accel.choose("auto", MachineConfig(kernel="/nowhere"))[0] == "kvm"


def test_linux_needs_an_extension(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    linux = config(tmp_path, BZIMAGE)
    where, why = accel.choose("auto", linux)
    assert where == "nested"
    assert "no vmx or svm" in why
    here.setattr(host, "extension", lambda: "svm")
    assert accel.choose("auto", linux) == ("kvm", "")


def test_payloads_run_here(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    assert accel.choose("auto", config(tmp_path, kernels.multiboot_elf())) == ("kvm", "")


def test_without_kvm_everything_nests(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    here.setattr(accel, "DEV_KVM", str(tmp_path / "kvm"))
    where, why = accel.choose("auto", config(tmp_path, kernels.multiboot_elf()))
    assert where == "nested"
    assert "No such file" in why


def test_the_user_has_the_last_word(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    linux = config(tmp_path, BZIMAGE)
    assert accel.choose("kvm", linux)[0] == "kvm"
    assert accel.choose("nested", MachineConfig(kernel="/k"))[0] == "nested"


def test_nobody_nests_in_an_appliance(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    here.setenv(accel.NESTED, "1")
    assert accel.choose("auto", config(tmp_path, BZIMAGE))[0] == "kvm"


def test_writable_directories(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"")
    wanted = MachineConfig(
        serial=out / "log", console="/dev/null", disks=[disk, "/nowhere/x.img,ro"]
    )
    assert accel.writable_directories(wanted) == sorted([str(tmp_path), str(out)])
    assert accel.writable_directories(MachineConfig(serial="stdio", console="pty")) == []


def test_what_runs_in_the_appliance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vmm.nested as nested

    seen: list[Any] = []

    class Options:
        def __init__(self, **options: Any) -> None:
            self.options = options

    def run(argv: list[str], options: Options) -> int:
        seen.extend([argv, options.options])
        return 7

    monkeypatch.setattr(nested, "Options", Options, raising=False)
    monkeypatch.setattr(nested, "run", run, raising=False)
    monkeypatch.setattr(nested, "usable_hint", lambda: None, raising=False)
    monkeypatch.setenv("PYTHONPATH", "/more")
    linux = config(tmp_path, BZIMAGE, memory="3G", timeout=10)
    assert accel.run_nested(linux, ["--quiet"], "because", verbose=True) == 7
    argv, options = seen
    assert argv[1:5] == ["-m", "vmm", "run", "--accel=kvm"]
    assert argv[5] == f"--kernel={tmp_path}/kernel"
    assert argv[-1] == "--quiet"
    assert options["timeout"] == 10 + accel.APPLIANCE_TIME
    assert options["memory"] == 4 << 30
    assert options["verbose"] is True
    root = Path(__file__).parents[2]
    assert options["env"] == [f"PYTHONPATH={root}:/more"]
    small = config(tmp_path, BZIMAGE)
    seen.clear()
    accel.run_nested(small, [], "", verbose=False)
    assert seen[1]["memory"] is None
    assert seen[1]["timeout"] is None


def test_missing_parts_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.nested.usable_hint", lambda: "QEMU is missing", raising=False)
    with pytest.raises(HostError, match="no KVM; QEMU is missing"):
        accel.run_nested(config(tmp_path, BZIMAGE), [], "no KVM", verbose=False)


@pytest.mark.parametrize(
    ("flags", "extension"),
    [("fpu vmx sse", "vmx"), ("fpu svm", "svm"), ("fpu avmx svme", ""), ("", "")],
)
def test_the_cpus_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, extension: str
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nflags\t\t: {flags}\nvmx flags\t: vnmi\n")
    monkeypatch.setattr(host, "CPUINFO", str(file))
    assert host.extension() == extension
    monkeypatch.setattr(host, "CPUINFO", str(tmp_path / "none"))
    assert host.extension() == ""

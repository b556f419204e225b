"""vmm doctor: every finding, with the host's answers put in its mouth."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import kernels
from vmm.arch import base
from vmm.arch.x86_64 import host
from vmm.cli import doctor
from vmm.cli.doctor import FAIL, NOTE, OK, WARN, Finding, Report
from vmm.cli.kernel import IKCONFIG_END, IKCONFIG_START, check_kernel, embedded_config
from vmm.errors import HostError


class FakeKvm:
    def __init__(self, *missing: str) -> None:
        self.missing = missing

    def __enter__(self) -> FakeKvm:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def check(self, cap: str) -> int:
        return 0 if cap in self.missing else 255


class FakeArch:
    required_caps = ("KVM_CAP_IRQCHIP", "KVM_CAP_IRQFD")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Examine a host with these properties."""

    def examine(*, extension: str = "vmx", kvm: object = None, nested: str | None = None) -> Report:
        def open_kvm(**_: object) -> object:
            if isinstance(kvm, Exception):
                raise kvm
            return kvm or FakeKvm()

        monkeypatch.setattr(host, "extension", lambda: extension)
        monkeypatch.setattr(base, "native_arch", FakeArch)
        monkeypatch.setattr("vmm.kvm.Kvm", open_kvm)
        monkeypatch.setattr("vmm.nested.usable_hint", lambda: nested, raising=False)
        return doctor.examine()

    return examine


def found(report: Report, what: str) -> Finding:
    return next(f for f in report.findings if f.what == what)


def test_a_good_host(fake: Callable[..., Report]) -> None:
    report = fake(nested="QEMU is missing: install qemu-system-x86")
    assert report.boots_linux
    assert found(report, "CPU").level == OK
    assert found(report, "vCPUs").said == "up to 255 in one machine"
    assert found(report, "appliance").level == NOTE
    assert "hardware" in report.summary()


def test_software_kvm_nests(fake: Callable[..., Report]) -> None:
    report = fake(extension="")
    assert report.boots_linux
    assert found(report, "CPU").level == WARN
    assert any(f.what == "KVM" and "stock Linux does not" in f.said for f in report.findings)
    assert "appliance" in report.summary()


def test_a_host_that_cannot_boot_linux(fake: Callable[..., Report]) -> None:
    report = fake(extension="", nested="QEMU is missing: install qemu-system-x86")
    assert not report.boots_linux
    finding = found(report, "appliance")
    assert (finding.level, finding.said, finding.do) == (
        FAIL,
        "QEMU is missing",
        "install qemu-system-x86",
    )


def test_no_access_to_kvm(fake: Callable[..., Report]) -> None:
    error = HostError("/dev/kvm may not be opened by this user. Add yourself to its group.")
    report = fake(kvm=error, nested="no")
    assert not report.boots_linux
    finding = found(report, "/dev/kvm")
    assert finding.level == FAIL
    assert finding.said == "may not be opened by this user"
    assert finding.do == "Add yourself to its group."


def test_missing_capabilities(fake: Callable[..., Report]) -> None:
    report = fake(kvm=FakeKvm("KVM_CAP_IRQFD"))
    assert "lacks KVM_CAP_IRQFD" in found(report, "KVM").said
    assert not report.kvm
    report = fake(kvm=FakeKvm("KVM_CAP_SIGNAL_MSI"))
    assert report.kvm
    assert any("KVM_CAP_SIGNAL_MSI" in f.said and f.level == NOTE for f in report.findings)


def test_another_architecture(fake: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    names = list(os.uname())
    names[4] = "riscv64"
    monkeypatch.setattr("os.uname", lambda: os.uname_result(names))
    assert found(fake(), "architecture").level == FAIL


def files(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    real = doctor._read
    monkeypatch.setattr(
        doctor,
        "_read",
        lambda path: next((t for name, t in texts.items() if path.endswith(name)), real(path)),
    )


@pytest.mark.parametrize(("value", "level"), [("Y", OK), ("1", OK), ("N", NOTE)])
def test_nesting_parameter(
    fake: Callable[..., Report], monkeypatch: pytest.MonkeyPatch, value: str, level: str
) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: value if "kvm_amd" in path else "")
    assert found(fake(), "kvm_amd").level == level


def test_memory_and_huge_pages(
    fake: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    files(
        monkeypatch,
        meminfo="MemAvailable: 204800 kB\nHugePages_Free: 7\nHugepagesize: 2048 kB",
        enabled="always madvise [never]",
    )
    report = fake()
    assert found(report, "memory").level == WARN
    assert found(report, "memory").said == "200 MiB available"
    assert found(report, "huge pages").said == "7 free of 2 MiB (--hugepages)"
    assert found(report, "transparent huge pages").level == NOTE


def test_limits(fake: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = {
        resource.RLIMIT_NOFILE: (256, 4096),
        resource.RLIMIT_AS: (1 << 30, 1 << 30),
        resource.RLIMIT_MEMLOCK: (64 << 10, 64 << 10),
    }
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    report = fake()
    assert found(report, "open files").do == "ulimit -n 4096"
    assert found(report, "address space").level == WARN
    assert found(report, "locked memory").level == NOTE


def test_as_text_and_json(fake: Callable[..., Report], capsys: pytest.CaptureFixture[str]) -> None:
    report = fake(extension="")
    lines = doctor.as_text(report).splitlines()
    assert lines[0].startswith("warn  CPU: ")
    assert lines[1].startswith("      -> ")
    assert lines[-1] == report.summary()
    assert doctor.main(["--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["boots_linux"] is True
    assert loaded["hardware"] is False
    assert {f["level"] for f in loaded["findings"]} <= {OK, NOTE, WARN, FAIL}


def test_status_is_one_when_linux_cannot_boot(
    fake: Callable[..., Report], capsys: pytest.CaptureFixture[str]
) -> None:
    fake(extension="", nested="QEMU is missing: install it")
    assert doctor.main([]) == 1
    assert "No Linux guest can be booted here" in capsys.readouterr().out


# ---- kernels --------------------------------------------------------------------------------


def check(path: Path) -> Report:
    report = Report()
    check_kernel(report, str(path))
    return report


def test_a_bzimage_with_its_configuration_beside_it(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz-1.2.3"
    image.write_bytes(kernels.bzimage(kernels.payload("gzip", kernels.vmlinux())))
    (tmp_path / "config-1.2.3").write_text(
        "# comment\nCONFIG_64BIT=y\nCONFIG_VIRTIO_BLK=m\n# CONFIG_ACPI is not set\n"
    )
    report = check(image)
    assert report.findings[0].level == OK
    assert "bzImage, 64-bit" in report.findings[0].said
    assert "gzip" in report.findings[0].said
    assert found(report, "kernel configuration").said == f"from {tmp_path}/config-1.2.3"
    assert found(report, "CONFIG_64BIT").said == "built in"
    assert "initrd must bring it" in found(report, "CONFIG_VIRTIO_BLK").said
    assert found(report, "CONFIG_ACPI").level == WARN
    assert "no power-off" in found(report, "CONFIG_ACPI").said
    assert found(report, "CONFIG_OVERLAY_FS").level == NOTE


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd", "lz4"])
def test_the_configuration_inside_a_bzimage(tmp_path: Path, kind: str) -> None:
    config = IKCONFIG_START + gzip.compress(b"CONFIG_SMP=y\n") + IKCONFIG_END
    image = tmp_path / "bzImage"
    image.write_bytes(kernels.bzimage(kernels.payload(kind, kernels.vmlinux() + config)))
    report = check(image)
    assert found(report, "kernel configuration").said == "from inside the image"
    assert found(report, "CONFIG_SMP").level == OK


def test_the_configuration_inside_an_elf(tmp_path: Path) -> None:
    config = IKCONFIG_START + gzip.compress(b"CONFIG_SMP=y\n") + IKCONFIG_END
    image = tmp_path / "vmlinux"
    image.write_bytes(kernels.vmlinux() + config)
    assert found(check(image), "CONFIG_SMP").level == OK
    packed = tmp_path / "vmlinux.gz"
    packed.write_bytes(gzip.compress(image.read_bytes()))
    report = check(packed)
    assert "packed with gzip as a whole" in report.findings[0].said
    assert found(report, "CONFIG_SMP").level == OK


def test_no_configuration(tmp_path: Path) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(kernels.vmlinux())
    assert found(check(image), "kernel configuration").level == NOTE


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"hello\n", "no kernel: text"),
        (b"\x7fELF", "truncated"),
        (kernels.bzimage(b"x" * 100)[:600], "truncated"),
        (b"QFI\xfb" + bytes(600), "qcow2"),
    ],
)
def test_what_is_no_kernel(tmp_path: Path, content: bytes, sentence: str) -> None:
    image = tmp_path / "file"
    image.write_bytes(content)
    (finding,) = check(image).findings
    assert finding.level == FAIL
    assert sentence in finding.said


def test_a_missing_kernel(tmp_path: Path) -> None:
    (finding,) = check(tmp_path / "none").findings
    assert (finding.level, "cannot open" in finding.said) == (FAIL, True)


@pytest.mark.parametrize("cut", [1, 7, 4096, 1 << 20])
def test_an_embedded_configuration_is_found_across_pieces(cut: int) -> None:
    data = bytes(5000) + IKCONFIG_START + gzip.compress(b"CONFIG_A=y") + IKCONFIG_END + bytes(99)
    pieces = (data[i : i + cut] for i in range(0, len(data), cut))
    assert embedded_config(pieces) == b"CONFIG_A=y"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        IKCONFIG_START,
        IKCONFIG_START + b"not gzip" + IKCONFIG_END,
        gzip.compress(b"CONFIG_A=y") + IKCONFIG_END,
    ],
)
def test_a_damaged_embedded_configuration_is_none(data: bytes) -> None:
    assert embedded_config(iter([data])) == b""


def test_a_configuration_that_explodes_is_bounded() -> None:
    bomb = IKCONFIG_START + gzip.compress(bytes(64 << 20)) + IKCONFIG_END
    assert len(embedded_config(iter([bomb]))) <= 4 << 20


def test_this_machine(capsys: pytest.CaptureFixture[str], kvm: str) -> None:
    """The real checks run and end in one of the two statuses."""
    assert doctor.main([]) in (0, 1)
    assert "/dev/kvm: can be opened" in capsys.readouterr().out

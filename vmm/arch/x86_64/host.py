"""What an x86-64 host brings to its KVM. See vmm.arch.base.Host."""

from __future__ import annotations

CPUINFO = "/proc/cpuinfo"

NO_EXTENSION: str = "no vmx or svm"
ENABLE: str = "enable VT-x or AMD-V in the firmware"
MODULES: tuple[str, ...] = ("kvm_intel", "kvm_amd")
OPTIONAL_CAPS = {
    "KVM_CAP_TSC_DEADLINE_TIMER": "the guest's precise timer",
    "KVM_CAP_GET_TSC_KHZ": "the guest's clock without calibration",
}


def extension() -> str:
    """``vmx`` (Intel), ``svm`` (AMD), or empty. The first CPU's entry says it for all."""
    try:
        with open(CPUINFO, "rb") as f:
            head = f.read(8192)
    except OSError:
        return ""
    for line in head.split(b"\n"):
        if line.startswith(b"flags"):
            words = line.split()
            return next((name for name in ("vmx", "svm") if name.encode() in words), "")
    return ""

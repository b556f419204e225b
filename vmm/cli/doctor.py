"""``vmm doctor``: what this machine can do for vmm, and what to change.

Every check is a function that gives findings; none changes anything. A finding is ``ok``,
``note`` (good to know), ``warn`` (works, but) or ``fail``, with what it means and what to do.
"""

from __future__ import annotations

from vmm.cli.parse import parse
from vmm.errors import HostError, KvmError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.arch.base import Host
    from vmm.kvm import Kvm

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "fail"
MIB = 1 << 20

#: What else of KVM is used when it is there, and for what, on every architecture.
NICE_CAPS = {
    "KVM_CAP_IOEVENTFD_NO_LENGTH": "doorbells decoded fastest",
    "KVM_CAP_IOEVENTFD_ANY_LENGTH": "doorbells of any width",
    "KVM_CAP_SIGNAL_MSI": "message-signalled interrupts by ioctl",
}


class Finding:
    """One line of the report. ``what`` was looked at, ``said`` is what was found, ``do`` what to
    change, or empty."""

    __slots__ = ("do", "level", "said", "what")

    def __init__(self, level: str, what: str, said: str, do: str = "") -> None:
        self.level = level
        self.what = what
        self.said = said
        self.do = do

    def as_dict(self) -> dict[str, str]:
        return {"level": self.level, "what": self.what, "said": self.said, "do": self.do}


class Report:
    """All findings, and whether Linux boots on this host's KVM or in an appliance."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.kvm = False
        self.hardware = False
        self.nested = False
        #: None on an architecture that vmm does not have.
        self.host: Host | None = None

    def add(self, level: str, what: str, said: str, do: str = "") -> None:
        self.findings.append(Finding(level, what, said, do))

    @property
    def boots_linux(self) -> bool:
        return (self.kvm and self.hardware) or self.nested

    def summary(self) -> str:
        if self.kvm and self.hardware:
            return "Linux guests run here on hardware virtualization."
        if self.nested:
            return "Linux guests run here in an appliance: 'vmm run' uses it by itself."
        return "No Linux guest can be booted here; see what to do above."


def main(argv: list[str]) -> int:
    """0 when Linux can be booted in some way, else 1."""
    given = parse(argv, "doctor").values
    if given.get("help"):
        from vmm.cli import help as text

        print(text.of("doctor"), end="")
        return 0
    report = examine(str(given["kernel"]) if "kernel" in given else None)
    print(_json(report) if given.get("json") else as_text(report))
    return 0 if report.boots_linux else 1


def examine(kernel: str | None = None) -> Report:
    """Every check. Never raises VmmError: what fails is a finding."""
    report = Report()
    checks: list[Callable[[Report], None]] = [
        _check_cpu, _check_kvm, _check_nesting_parameter, _check_memory, _check_limits,
        _check_appliance, _check_packages,
    ]  # fmt: skip
    for check in checks:
        check(report)
    if kernel is not None:
        from vmm.cli.kernel import check_kernel

        check_kernel(report, kernel)
    return report


def as_text(report: Report) -> str:
    """For people: a line for each finding, and one for what to do about it."""
    lines = []
    for f in report.findings:
        lines.append(f"{f.level:<5} {f.what}: {f.said}")
        if f.do:
            lines.append(f"      -> {f.do}")
    return "\n".join([*lines, "", report.summary()])


def _json(report: Report) -> str:
    import json

    return json.dumps(
        {
            "boots_linux": report.boots_linux,
            "kvm": report.kvm,
            "hardware": report.hardware,
            "nested": report.nested,
            "summary": report.summary(),
            "findings": [f.as_dict() for f in report.findings],
        },
        indent=2,
    )


# ---- checks ---------------------------------------------------------------------------------


def _check_cpu(report: Report) -> None:
    from vmm.arch.base import native_host

    try:
        host = native_host()
    except HostError as e:
        report.add(FAIL, "architecture", str(e))
        return
    report.host = host
    extension = host.extension()
    report.hardware = bool(extension)
    if extension:
        report.add(OK, "CPU", f"has {extension}: guests run in hardware")
    else:
        report.add(
            WARN,
            "CPU",
            f"has {host.NO_EXTENSION}: there is no hardware virtualization here",
            f"on a machine of your own, {host.ENABLE}; in a cloud VM, choose a type with nested "
            "virtualization; or let 'vmm run' use an appliance",
        )


def _check_kvm(report: Report) -> None:
    from vmm.arch.base import native_arch
    from vmm.kvm import DEV_KVM, Kvm

    try:
        needed = native_arch().required_caps
        with Kvm(modules=report.host.MODULES if report.host is not None else ()) as kvm:
            report.add(OK, DEV_KVM, "can be opened, speaks API 12")
            missing = [cap for cap in needed if not kvm.check(cap)]
            if missing:
                report.add(
                    FAIL,
                    "KVM",
                    f"lacks {', '.join(missing)}, which vmm needs",
                    "use a newer host kernel",
                )
                return
            report.kvm = True
            report.add(OK, "KVM", f"has the {len(needed)} capabilities vmm needs")
            _check_nice(report, kvm)
    except VmmError as e:
        text, _, advice = str(e).partition(". ")
        report.add(FAIL, DEV_KVM, text.removeprefix(f"{DEV_KVM} "), advice)
        return
    if not report.hardware:
        report.add(
            WARN,
            "KVM",
            "emulates every instruction in software here, and not all of them: payload guests "
            "run, stock Linux does not",
            "nothing: 'vmm run' uses an appliance for Linux by itself",
        )


def _check_nice(report: Report, kvm: Kvm) -> None:
    from vmm._native import lib

    nice = NICE_CAPS | (report.host.OPTIONAL_CAPS if report.host is not None else {})
    for cap, use in nice.items():
        try:
            there = hasattr(lib, cap) and kvm.check(cap)
        except KvmError:
            there = False
        if not there:
            report.add(NOTE, "KVM", f"has no {cap} ({use}); vmm does without")
    report.add(OK, "vCPUs", f"up to {kvm.check('KVM_CAP_MAX_VCPUS')} in one machine")


def _check_nesting_parameter(report: Report) -> None:
    """Whether guests of this host could be hosts themselves."""
    for module in report.host.MODULES if report.host is not None else ():
        value = _read(f"/sys/module/{module}/parameters/nested")
        if value in ("Y", "1"):
            report.add(OK, module, "nested=1: guests may run guests of their own")
        elif value:
            report.add(
                NOTE,
                module,
                "nested=0: guests cannot run guests of their own",
                f"if that is wanted: options {module} nested=1 in /etc/modprobe.d/kvm.conf",
            )


def _check_memory(report: Report) -> None:
    facts = _fields("/proc/meminfo")
    available = facts.get("MemAvailable", 0) // 1024
    if not available:
        report.add(NOTE, "memory", "how much is available cannot be told")
        return
    level = OK if available >= 1024 else WARN
    advice = "" if level == OK else "give guests less with --memory, or end other programs"
    report.add(level, "memory", f"{available} MiB available", advice)
    pages, size = facts.get("HugePages_Free", 0), facts.get("Hugepagesize", 0) // 1024
    if pages:
        report.add(OK, "huge pages", f"{pages} free of {size} MiB (--hugepages)")
    else:
        report.add(NOTE, "huge pages", "none reserved; --hugepages needs vm.nr_hugepages")
    modes = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    if "[never]" in modes:
        report.add(
            NOTE,
            "transparent huge pages",
            "off; guests with much memory run faster with them",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _check_limits(report: Report) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        report.add(
            WARN, "open files", f"limit {soft} (hard {hard})", f"ulimit -n {max(hard, soft)}"
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        report.add(
            WARN,
            "address space",
            f"limited to {space // MIB} MiB; guest RAM counts",
            "ulimit -v unlimited",
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and locked < 8 * MIB:
        report.add(NOTE, "locked memory", f"limited to {locked // 1024} KiB (ulimit -l)")


def _check_appliance(report: Report) -> None:
    """The parts of 'vmm nested'."""
    from vmm import nested

    missing = nested.usable_hint()
    if missing is None:
        report.nested = True
        report.add(OK, "appliance", "QEMU and a kernel are here: 'vmm nested' works")
    else:
        text, _, advice = missing.partition(": ")
        level = NOTE if report.kvm and report.hardware else FAIL
        report.add(level, "appliance", text, advice)


def _check_packages(report: Report) -> None:
    """Python packages that single features need."""
    from importlib.util import find_spec

    uses = {
        "lz4": "kernels packed with lz4",
        "zstandard": "kernels packed with zstd",
        "capstone": "decoded instructions in diagnoses",
    }
    for name, use in uses.items():
        if find_spec(name) is None:
            report.add(WARN, f"Python package {name}", f"missing: no {use}", f"pip install {name}")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return f.read(4096).strip()
    except OSError:
        return ""


def _fields(path: str) -> dict[str, int]:
    """``Name:  123 kB`` lines."""
    found = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found

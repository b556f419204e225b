"""Imports go one way, the public surface is what it says, and nothing heavy is on the boot path."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import vmm

PACKAGE = Path(vmm.__file__).parent

#: Rooms from the bottom up: a module imports from its own room or one below it.
ROOMS = [
    {"errors", "host", "_native", "values", "options", "disk", "listener"},
    {"memory", "kvm", "bus", "irq", "device", "catalog", "settings", "config", "result"},
    {"chario", "console", "terminal", "oops", "diagnose"},
    {"chardev", "board", "vcpus", "ending"},
    {"devices", "arch"},
    {"guest"},
    {"machine", "qtest"},
    {"nested"},
    {"testing"},
    {"cli", "__main__", "__init__"},
]

#: What `vmm run` may not import before the guest runs: measured at 6 to 90 ms each on a quiet
#: host, and many times that in an emulated one.
HEAVY = {
    "argparse", "asyncio", "construct", "dataclasses", "inspect", "json", "logging", "pathlib",
    "re", "shutil", "subprocess", "tomllib", "typing", "capstone",
}  # fmt: skip


NATIVE = PACKAGE.parent / "native"
#: Names of architectures, of machines that have one, and of what only one has in its KVM.
ARCHITECTURES = re.compile(
    r"(?<!0)x86|amd64|\bi[3-6]86|arm64|aarch64|armv[78]|risc-?v|ppc64|powerpc|s390|loongarch"
    r"|i440fx|kvm[-_](?:amd|intel)|\bcpuid\b|\blapic\b|\bioapic\b|\b(?:svm|vmx)\b"
    r"|\b[re]ip\b|\brax\b|\brflags\b|\bsregs\b|triple.fault",
    re.IGNORECASE,
)
#: The packages of architectures.
PACKAGES = {path.parent.name for path in PACKAGE.glob("arch/*/__init__.py")}


def room_of(module: str) -> int:
    name = module.split(".")[1] if "." in module else "__init__"
    for level, names in enumerate(ROOMS):
        if name in names:
            return level
    raise AssertionError(f"{module} is in no room; add it to ROOMS")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of vmm that a file imports when it runs (not only for type checkers)."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        and isinstance(branch.test, ast.Name)
        and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vmm"):
            if node.module == "vmm":
                names = {alias.name for alias in node.names if not alias.name.startswith("__")}
                found |= {f"vmm.{name}" for name in names}
            else:
                found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("vmm.")}
    return found


def test_imports_go_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = module_name(path)
        if here == "vmm":
            continue
        above = (m for m in imports(path) if m != "vmm" and room_of(m) > room_of(here))
        wrong += [f"{here} imports {target}" for target in above]
    assert not wrong


def test_devices_know_no_machine_and_shared_code_no_architecture() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = module_name(path)
        for target in imports(path):
            if here.startswith("vmm.devices") and target.startswith("vmm.arch"):
                wrong.append(f"{here} imports {target}")
            shared = len(here.split(".")) < 4 or not here.startswith("vmm.arch.")
            if shared and any(f"{target}.".startswith(f"vmm.arch.{name}.") for name in PACKAGES):
                wrong.append(f"{here} imports {target}")
    assert not wrong


def test_only_arch_names_an_architecture() -> None:
    """What is true of one architecture is in its package, or in native's one file for it."""
    shared = [p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] != "arch"]
    native = [p for p in NATIVE.iterdir() if p.suffix in (".c", ".h", ".cdef", ".py")]
    shared += [p for p in native if not p.name.startswith("arch_")]
    wrong = [
        f"{path.name}:{nr}: {found[0]}"
        for path in shared
        for nr, line in enumerate(path.read_text().splitlines(), 1)
        for found in [ARCHITECTURES.search(line)]
        if found
    ]
    assert not wrong
    asks = [path.name for path in shared if "uname().machine" in path.read_text()]
    assert asks == ["build.py"]  # to choose that one file


def test_public_surface() -> None:
    for name in vmm.__all__:
        assert getattr(vmm, name) is not None
    assert set(vmm._HOMES) | {"__version__"} == set(vmm.__all__)


def test_boot_path_is_lean(tmp_path: Path, kvm: str) -> None:
    """A payload that ends at once: all that `vmm run` imported until the guest ran, and after."""
    kernel = tmp_path / "payload"
    kernel.write_bytes(bytes.fromhex("b007 e6f4 f4"))  # mov al, 7; out 0xf4, al; hlt
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; before = set(sys.modules);"
        "from vmm.cli import main;"
        f"status = main(['run', '--accel=kvm', '--boot=flat', '-k', {str(kernel)!r},"
        " '--testdev', '--timeout=30', '--serial=none']);"
        "print('IMPORTED', status, *sorted(set(sys.modules) - before), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("IMPORTED")]
    assert lines, done.stderr
    status, *loaded = lines[0].split()[1:]
    assert status == "15", done.stderr
    assert "vmm.machine" in loaded
    assert not set(loaded) & HEAVY

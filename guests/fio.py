"""fio for Linux guests without a distribution: an initramfs to be loaded beside another one.

Debian's fio links with the clients of four storage clusters. Their libraries would be 100 MB, so a
guest gets empty ones under their names; those that a guest uses are real.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from vmm.errors import HostError
from vmm.guest.cpio import CpioWriter
from vmm.guest.kernels import fetch_package

BUILD = Path(__file__).resolve().parent.parent / "build" / "initramfs"
PACKAGES = ("libc6", "libaio1", "libnuma1", "zlib1g")
LOADER = "ld-linux-x86-64.so.2"


def fio_archive() -> Path:
    """A cpio archive with /bin/fio and /lib of its own; made on first use, with gcc and nm."""
    target = BUILD / "fio-1.cpio"
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    fio = Path(fetch_package("fio")) / "usr/bin/fio"
    libraries: dict[str, Path] = {}
    for package in PACKAGES:
        for path in sorted(Path(fetch_package(package)).rglob("*.so.*")):
            libraries.setdefault(path.name, path)
    needed = _needed(fio)
    real = [name for name in (*needed, LOADER) if name in libraries]
    missing = _missing(fio, [libraries[name] for name in real])
    with tempfile.TemporaryDirectory() as scratch:
        archive = target.with_suffix(f".{os.getpid()}")
        with open(archive, "wb") as out:
            cpio = CpioWriter(out)
            for directory in ("bin", "lib", "lib64"):
                cpio.add_dir(directory)
            cpio.add_file("bin/fio", fio.read_bytes(), 0o755)
            for name in real:
                cpio.add_file(f"lib/{name}", libraries[name].read_bytes(), 0o755)
            cpio.add_symlink(f"lib64/{LOADER}", f"/lib/{LOADER}")
            for name, versions in needed.items():
                if name not in real:
                    stub = _stub(Path(scratch), versions, missing)
                    cpio.add_file(f"lib/{name}", stub.read_bytes(), 0o755)
            cpio.close()
    archive.rename(target)
    return target


def _needed(fio: Path) -> dict[str, list[str]]:
    """The libraries it is linked with, and which versions of symbols it wants of each."""
    found: dict[str, list[str]] = {}
    current = ""
    for words in map(str.split, _run("objdump", "-p", str(fio)).splitlines()):
        if words[:1] == ["NEEDED"]:
            found[words[1]] = []
        elif words[:2] == ["required", "from"]:
            current = words[2].rstrip(":")
        elif current and len(words) == 4 and words[0].startswith("0x"):
            found[current].append(words[3])
    return found


def _missing(fio: Path, libraries: list[Path]) -> dict[str, set[str]]:
    """Symbols that it wants and none of the libraries has, by version ('' for none)."""
    have = {name for library in libraries for name, _ in _symbols("--defined-only", library)}
    missing: dict[str, set[str]] = {}
    for name, version in _symbols("--undefined-only", fio):
        if name not in have:
            missing.setdefault(version, set()).add(name)
    return missing


def _symbols(kind: str, path: Path) -> set[tuple[str, str]]:
    """(name, version) of the dynamic symbols that are not weak."""
    words = map(str.split, _run("nm", "-D", kind, str(path)).splitlines())
    strong = [word[-1].replace("@@", "@").partition("@") for word in words if word[-2] not in "wv"]
    return {(name, version) for name, _, version in strong}


def _stub(scratch: Path, versions: list[str], missing: dict[str, set[str]]) -> Path:
    """A library with functions of these versions, and those of none, that do nothing."""
    source, script, stub = scratch / "stub.c", scratch / "stub.map", scratch / "stub.so"
    names = {version: missing.get(version, set()) for version in ("", *versions)}
    functions = sorted(set().union(*names.values()))
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
    nodes = (f"{v} {{ {' '.join(f'{n};' for n in sorted(names[v]))} }};\n" for v in versions)
    script.write_text("".join(nodes))
    flags = ["-w", "-fno-builtin", "-nostdlib", "-shared", "-fPIC"]
    flags += [f"-Wl,--version-script={script}"] if versions else []
    _run("gcc", *flags, "-o", str(stub), str(source))
    return stub


def _run(*argv: str) -> str:
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as e:
        raise HostError(f"{argv[0]} failed while fio was prepared for a guest: {e}") from e

"""What the documents tell a reader to type: commands are understood, Python compiles."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kernels import bzimage
from vmm import catalog

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(path.read_text()) if name == language]


def run_lines() -> list[str]:
    """Every ``vmm run`` of a console block, continued lines joined."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path, "console"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line[2:] for line in lines if line.startswith("$ vmm run")]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files the examples name."""
    for name in ("vmlinuz", "bzImage"):
        (tmp_path / name).write_bytes(bzimage())
    for name in ("initrd.img", "test.cpio"):
        (tmp_path / name).write_bytes(b"070701")
    with (tmp_path / "debian.img").open("wb") as image:
        image.truncate(1 << 20)
    return tmp_path


def test_there_are_examples() -> None:
    assert len(run_lines()) >= 3


@pytest.mark.parametrize("line", run_lines())
def test_a_command_is_understood(line: str, folder: Path) -> None:
    """Up to the machine it would build."""
    if "--net user" in line and shutil.which("passt") is None:
        pytest.skip("passt is not installed (apt install passt)")
    lexer = shlex.shlex(line, punctuation_chars=";", posix=True)
    lexer.whitespace_split = True
    words = list(lexer)
    words = words[: words.index(";")] if ";" in words else words
    at = words.index("--") if "--" in words else len(words)
    flags = ["--dry-run", "--accel", "kvm"]
    argv = [sys.executable, "-m", "vmm", *words[1:at], *flags, *words[at:]]
    done = subprocess.run(
        argv, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "command line" in done.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_compiles(path: Path) -> None:
    for text in blocks(path, "python"):
        compile(text, str(path), "exec")


def test_the_device_of_the_document_is_one(tmp_path: Path) -> None:
    text = blocks(ROOT / "docs/devices.md", "python")[0]
    name = re.search(r"^class (\w+)", text, re.MULTILINE)
    assert name is not None
    (tmp_path / "device.py").write_text(text)
    spec = catalog.parse(f"device.py:{name.group(1)}", str(tmp_path))
    assert spec.cls.__name__ == name.group(1)

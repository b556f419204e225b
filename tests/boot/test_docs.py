"""What the documents show, run as it is printed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guests.initramfs import SCRIPTS, build, kernel_tree
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from tests.unit.test_docs import ROOT, blocks


def test_the_library_as_in_the_readme(tmp_path: Path) -> None:
    kernel = kernel_tree()
    (tmp_path / "vmlinuz").symlink_to(kernel.image)
    (tmp_path / "initrd.img").symlink_to(build(SCRIPTS["shell"], kernel))
    program = tmp_path / "program.py"
    program.write_text(blocks(ROOT / "README.md", "python")[0])
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_TIMEOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Linux ")
    assert lines[-1] == "poweroff"
    count_boot()


def examples(name: str) -> list[tuple[str, str]]:
    """The lines typed in a document's console blocks, and what it says comes out."""
    found: list[tuple[str, str]] = []
    for block in blocks(ROOT / "docs" / name, "console"):
        for line in block.splitlines(keepends=True):
            if line.startswith("$ "):
                found.append((line[2:].strip(), ""))
            else:
                found[-1] = (found[-1][0], found[-1][1] + line)
    return found


@pytest.mark.parametrize(("line", "output"), examples("command.md"))
def test_commands_as_in_the_document(line: str, output: str) -> None:
    script = f'vmm() {{ "{sys.executable}" -m vmm "$@"; }}\n{line}\n'
    done = subprocess.run(
        ["sh", "-c", script], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=BOOT_TIMEOUT, check=False,
    )  # fmt: skip
    assert done.stdout == output
    count_boot()


def test_the_library_as_in_the_document() -> None:
    done = subprocess.run(
        [sys.executable, "-c", blocks(ROOT / "docs/command.md", "python")[0]], cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BOOT_TIMEOUT, check=False,
    )  # fmt: skip
    assert done.stdout.endswith(" 0 b'5\\n' exited\n"), done.stderr
    count_boot()

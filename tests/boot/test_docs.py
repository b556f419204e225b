"""The README's program, run as it is printed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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

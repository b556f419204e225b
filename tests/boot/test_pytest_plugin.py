"""Tests of docs/pytest.md, run as a reader would: one passes, one finds its guest panicked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import count_boot
from tests.unit.test_docs import ROOT, blocks


def test_the_document_s_tests(tmp_path: Path) -> None:
    (tmp_path / "test_guests.py").write_text(blocks(ROOT / "docs/pytest.md", "python")[0])
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(ROOT)
    plain = ["-p", "no:cacheprovider", "-p", "no:rerunfailures", "-p", "vmm.testing.plugin"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", *plain, "--junitxml=junit.xml",
         "-k", "panic or results"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    for _ in range(2):
        count_boot()
    assert "test_results_of_its_own PASSED" in said, said
    assert "test_a_panic_is_told FAILED" in said, said
    assert "the guest's kernel: Kernel panic - not syncing: sysrq triggered crash" in said, said
    assert "the guest's console, its last" in said
    assert "sysrq triggered crash" in (tmp_path / "junit.xml").read_text()

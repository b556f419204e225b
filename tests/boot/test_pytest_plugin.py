"""The tests of docs/pytest.md, run as a reader would: three pass, one finds its guest panicked."""

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
        [sys.executable, "-m", "pytest", "-v", *plain, "--junitxml=junit.xml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    for name in ("test_release", "test_processors", "test_results_of_its_own"):
        assert f"{name} PASSED" in said, said
        count_boot()
    assert "test_a_panic_is_told FAILED" in said
    count_boot()
    assert "the guest's kernel: Kernel panic - not syncing: sysrq triggered crash" in said, said
    assert "the guest's console, its last" in said
    assert "sysrq triggered crash" in (tmp_path / "junit.xml").read_text()

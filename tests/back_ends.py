"""Back ends of others, for tests: Debian's qemu-storage-daemon and virtiofsd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Self

import pytest

from tests.support.waiting import wait_for

STORAGE_DAEMON = "qemu-storage-daemon"
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")


class Process:
    """A back end that listens at ``path``; ends with the ``with``."""

    def __init__(self, words: list[str], path: Path, log: Path) -> None:
        self.words = words
        self.path = path
        self.log = log
        self.start()

    def start(self) -> None:
        """Also again, after ``kill``."""
        self.path.unlink(missing_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log)
        wait_for(self._listens, 30)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        if not self.path.exists():
            return False
        # Not by connecting: it takes one front end, and might take this for it.
        text = Path("/proc/net/unix").read_text()
        return any(
            line.endswith(str(self.path)) and line.split()[3] == "00010000"
            for line in text.splitlines()
        )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def storage_daemon(image: Path, *, queues: int = 1, writable: bool = True) -> Process:
    """The image as a vhost-user-blk disk. Skips the test where the program is missing."""
    program = shutil.which(STORAGE_DAEMON)
    if program is None:
        pytest.skip(f"{STORAGE_DAEMON} is not installed (Debian: qemu-system-common)")
    path = image.with_suffix(".socket")
    words = [
        program,
        "--blockdev", f"driver=file,node-name=file,filename={image},cache.direct=off",
        "--export", f"type=vhost-user-blk,id=disk,node-name=file,addr.type=unix,addr.path={path},"
        f"num-queues={queues},writable={'on' if writable else 'off'}",
    ]  # fmt: skip
    return Process(words, path, image.with_suffix(".log"))


def file_daemon(directory: Path, home: Path) -> Process:
    """The directory as vhost-user-fs. Skips the test where the program is missing, or may not."""
    program = next((name for name in VIRTIOFSD if os.path.exists(name)), None)
    if program is None:
        pytest.skip("virtiofsd is not installed (Debian 12: qemu-system-common)")
    if os.geteuid():
        pytest.skip("virtiofsd needs root")
    path = home / "fs.socket"
    words = [
        program, f"--socket-path={path}", "-o", f"source={directory}", "-o", "sandbox=chroot",
        "-o", "cache=none", "-f",
    ]  # fmt: skip
    return Process(words, path, home / "fs.log")

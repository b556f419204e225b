"""QEMU's monitor, as far as a nested machine needs it: QMP commands, one after another."""

from __future__ import annotations

import json
import socket
import time

from vmm.arch.base import native_nesting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PATIENCE_S = 60.0  # for one answer of QEMU
_LAST_WORDS_S = 10.0  # for those of a machine that hangs
_SAMPLES = 3


class Monitor:
    """QMP on a connected socket, which is owned from here on. One thread."""

    __slots__ = ("_greeted", "socket")

    def __init__(self, ours: socket.socket) -> None:
        self.socket = ours
        self._greeted = False
        ours.setblocking(True)
        ours.settimeout(_PATIENCE_S)

    def close(self) -> None:
        self.socket.close()

    def command(self, name: str, arguments: dict[str, object] | None = None, fd: int = -1) -> Any:
        """What the command returns; ``fd`` is passed to it unless it is -1.

        ValueError: QEMU refused it, or closed the monitor; OSError: it did not answer.
        """
        if not self._greeted:
            self._greeted = True
            self._answer()
            self.command("qmp_capabilities")
        data = json.dumps({"execute": name, "arguments": arguments or {}}).encode()
        socket.send_fds(self.socket, [data], [fd] if fd >= 0 else [])
        while True:
            answer = self._answer()
            if "error" in answer:
                raise ValueError(f"{name}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def where(self) -> str:
        """Where the CPUs of a machine that hangs are, a few times; nothing is asked after that."""
        said: list[str] = []
        ask: dict[str, object] = {"command-line": "info registers -a"}
        try:
            self.socket.settimeout(_LAST_WORDS_S)
            for _ in range(_SAMPLES):
                text = self.command("human-monitor-command", ask)
                said.append(native_nesting().places(text))
                time.sleep(0.1)
        except (OSError, ValueError):
            said.append("QEMU's monitor does not answer")
        return "; ".join(dict.fromkeys(said))

    def _answer(self) -> dict[str, Any]:
        """The next line from QEMU; events are lines too."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self.socket.recv(1)
            if not byte:
                raise ValueError("QEMU closed its monitor")
            line += byte
        answer: dict[str, Any] = json.loads(line)
        return answer

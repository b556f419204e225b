"""QMP, as far as qtest's clients need it: JSON objects, one per line, a greeting first."""

from __future__ import annotations

import json
import os
import time

from vmm import __version__
from vmm.arch.base import native_qtest
from vmm.errors import VmmError
from vmm.qtest.devices import types
from vmm.qtest.options import Props, flatten

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.qtest.machine import QtestMachine

#: Bytes of one command.
MAX_MESSAGE = 1 << 20
#: Bytes a ring buffer gives at once.
_MAX_RING = 1 << 16
_DIGITS = 3


class QmpError(Exception):
    """Answered with an error of this class."""

    def __init__(self, message: str, kind: str = "GenericError") -> None:
        super().__init__(message)
        self.kind = kind


class Splitter:
    """Finds where a JSON object ends in a buffer that grows."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._string = self._escape = False

    def take(self, text: bytearray) -> bytes | None:
        """One object (or line that is none) off the front, or None while it is not all there.
        Raises QmpError when it is too long; the buffer is empty then."""
        end = self._end(text)
        if end < 0 and len(text) <= MAX_MESSAGE:
            return None
        self._at = self._depth = 0
        self._string = self._escape = False
        if not 0 <= end <= MAX_MESSAGE:
            text.clear()
            raise QmpError(f"a command is longer than {MAX_MESSAGE} bytes")
        found = bytes(text[:end])
        del text[:end]
        return found

    def _end(self, text: bytearray) -> int:
        while self._at < len(text):
            byte = text[self._at]
            self._at += 1
            if self._string:
                if self._escape:
                    self._escape = False
                elif byte == 0x5C:
                    self._escape = True
                elif byte == 0x22:
                    self._string = False
            elif byte == 0x22:
                self._string = True
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]":
                self._depth -= 1
                if self._depth <= 0:
                    return self._at
            elif byte == 0x0A and not self._depth:
                return self._at
        return -1


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def event(name: str, **data: object) -> dict[str, Any]:
    """An event, dated now."""
    seconds, micros = divmod(int(time.time() * 1e6), 1_000_000)
    message: dict[str, Any] = {"event": name}
    if data:
        message["data"] = data
    message["timestamp"] = {"seconds": seconds, "microseconds": micros}
    return message


def version() -> dict[str, Any]:
    parts = [int(p) if p.isdigit() else 0 for p in __version__.split(".")[:_DIGITS]]
    parts += [0] * (_DIGITS - len(parts))
    names = ("major", "minor", "micro")
    return {"qemu": dict(zip(names, parts, strict=True)), "package": f"vmm {__version__}"}


class Session:
    """One client. ``tell`` sends an event to every client, ``quit`` ends the server."""

    def __init__(
        self,
        machine: QtestMachine,
        tell: Callable[[dict[str, Any]], None],
        quit: Callable[[int], None],
    ) -> None:
        self.machine = machine
        self.ready = False
        self._tell = tell
        self._quit = quit
        self._splitter = Splitter()
        self._commands: dict[str, Callable[[dict[str, Any]], object]] = {
            name[3:].replace("_", "-"): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }
        # Two that QEMU spells with an underscore.
        for old in ("device_add", "device_del", "system_reset", "system_powerdown", "block_resize"):
            self._commands[old] = self._commands.pop(old.replace("_", "-"))

    def greet(self) -> bytes:
        return encode({"QMP": {"version": version(), "capabilities": []}})

    def take(self, data: bytearray) -> bytes | None:
        """Act on the first command in ``data``, taken off: what to send back. None: more has to
        come first."""
        try:
            message = self._splitter.take(data)
        except QmpError as e:
            return self._error(e, None)
        if message is None:
            return None
        return self._one(message) if message.strip() else b""

    def _one(self, text: bytes) -> bytes:
        ident: dict[str, Any] | None = None
        try:
            try:
                message = json.loads(text)
            except (ValueError, RecursionError):
                raise QmpError("JSON parse error") from None
            if not isinstance(message, dict):
                raise QmpError("QMP input must be a JSON object")
            ident = {"id": message["id"]} if "id" in message else None
            return encode({"return": self._run(message), **(ident or {})})
        except QmpError as e:
            return self._error(e, ident)
        except VmmError as e:
            return self._error(QmpError(str(e)), ident)

    @staticmethod
    def _error(e: QmpError, ident: dict[str, Any] | None) -> bytes:
        return encode({"error": {"class": e.kind, "desc": str(e)}, **(ident or {})})

    def _run(self, message: dict[str, Any]) -> object:
        command, arguments = message.get("execute"), message.get("arguments", {})
        left = set(message) - {"execute", "arguments", "id"}
        if not isinstance(command, str):
            raise QmpError("QMP input lacks member 'execute'")
        if left:
            raise QmpError(f"QMP input member '{min(left)}' is unexpected")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if self.ready == (command == "qmp_capabilities"):
            what = (
                "Capabilities negotiation is already complete, command ignored"
                if self.ready
                else "Expecting capabilities negotiation with 'qmp_capabilities'"
            )
            raise QmpError(what, "CommandNotFound")
        if not self.ready:
            self.ready = True
            return {}
        run = self._commands.get(command)
        if run is None:
            raise QmpError(f"The command {command} has not been found", "CommandNotFound")
        return run(arguments)

    # ---- what is there

    def do_query_version(self, _: dict[str, Any]) -> object:
        return version()

    def do_query_commands(self, _: dict[str, Any]) -> object:
        return [{"name": name} for name in sorted([*self._commands, "qmp_capabilities"])]

    def do_query_status(self, _: dict[str, Any]) -> object:
        running = self.machine.running
        return {"status": "running" if running else "paused", "running": running}

    def do_query_name(self, _: dict[str, Any]) -> object:
        return {"name": "vmm"}

    def do_query_machines(self, _: dict[str, Any]) -> object:
        return [
            {
                "name": name,
                "cpu-max": 1,
                "hotpluggable-cpus": False,
                "numa-mem-supported": False,
                "deprecated": False,
                **({"is-default": True} if name == "pc" else {}),
            }
            for name in native_qtest().MACHINES
        ]

    def do_qom_list_types(self, arguments: dict[str, Any]) -> object:
        """All device types; ``implements`` narrows to those below one."""
        root, abstract = arguments.get("implements"), arguments.get("abstract", False)
        tree = dict(types())
        if abstract:
            tree |= {p: "device" for p in set(tree.values()) - set(tree) - {"device"}}
            tree["device"] = "object"
        found = []
        for name, parent in sorted(tree.items()):
            lineage, at = [name], parent
            while at and at not in lineage:
                lineage.append(at)
                at = tree.get(
                    at, "" if at == "object" else "device" if at != "device" else "object"
                )
            if root is None or root in lineage:
                found.append({"name": name, "parent": parent})
        return found

    def do_qom_list(self, arguments: dict[str, Any]) -> object:
        path = _text(arguments, "path").rstrip("/")
        plugged = self.machine.plugged
        rows = {
            "": [("machine", "child<machine>")],
            "/machine": [
                ("type", "string"),
                ("peripheral", "child<container>"),
                ("peripheral-anon", "child<container>"),
            ],
            "/machine/peripheral": [(n, f"child<{w.driver}>") for n, (w, _) in plugged.items()],
            "/machine/peripheral-anon": [],
        }
        for name, (wanted, _) in plugged.items():
            rows[f"/machine/peripheral/{name}"] = [("type", "string"), ("realized", "bool")]
            rows[name] = rows[f"/machine/peripheral/{name}"]
            del wanted
        if path not in rows:
            raise QmpError(f"Device '{path}' not found", "DeviceNotFound")
        return [{"name": name, "type": kind} for name, kind in rows[path]]

    # ---- devices

    def do_device_add(self, arguments: dict[str, Any]) -> object:
        _text(arguments, "driver")
        try:
            pairs = flatten(arguments)
        except ValueError as e:
            raise QmpError(str(e)) from None
        self.machine.add(Props("-device", pairs))
        return {}

    def do_device_del(self, arguments: dict[str, Any]) -> object:
        name = _text(arguments, "id").removeprefix("/machine/peripheral/")
        try:
            self.machine.remove(name)
        except KeyError:
            raise QmpError(f"Device '{name}' not found", "DeviceNotFound") from None
        self._tell(event("DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}"))
        return {}

    def do_block_resize(self, arguments: dict[str, Any]) -> object:
        name = arguments.get("node-name", arguments.get("device"))
        size = arguments.get("size")
        if not isinstance(name, str) or not isinstance(size, int) or isinstance(size, bool):
            raise QmpError("'node-name' or 'device', and 'size', are needed")
        if size < 0 or size > 1 << 62:
            raise QmpError("'size' must be positive")
        if not self.machine.resize(name, size):
            raise QmpError(f"Cannot find device='{name}' nor node-name='{name}'")
        return {}

    def do_ringbuf_read(self, arguments: dict[str, Any]) -> object:
        """What a console printed since the last look."""
        import base64

        size = arguments.get("size", _MAX_RING)
        if not isinstance(size, int) or size < 0:
            raise QmpError("'size' must be positive")
        data = self.machine.printed(_ring(self.machine, arguments), min(size, _MAX_RING))
        if arguments.get("format") == "base64":
            return base64.b64encode(data).decode()
        return data.decode("utf-8", "replace")

    def do_ringbuf_write(self, arguments: dict[str, Any]) -> object:
        import base64

        text = _text(arguments, "data")
        try:
            raw = (
                base64.b64decode(text, validate=True)
                if arguments.get("format") == "base64"
                else None
            )
        except ValueError:
            raise QmpError("'data' is not base64") from None
        data = text.encode("utf-8", "replace") if raw is None else raw
        self.machine.rings[_ring(self.machine, arguments)].input.push(data)
        return {}

    # ---- the run

    def do_system_reset(self, _: dict[str, Any]) -> object:
        self.machine.reset()
        self._tell(event("RESET", guest=False, reason="host-qmp-system-reset"))
        return {}

    def do_system_powerdown(self, _: dict[str, Any]) -> object:
        self.machine.press_power_button()
        self._tell(event("POWERDOWN"))
        return {}

    def do_stop(self, _: dict[str, Any]) -> object:
        if self.machine.running:
            self.machine.running = False
            self._tell(event("STOP"))
        return {}

    def do_cont(self, _: dict[str, Any]) -> object:
        if not self.machine.running:
            self.machine.resume()
            self._tell(event("RESUME"))
        return {}

    def do_quit(self, _: dict[str, Any]) -> object:
        self._tell(event("SHUTDOWN", guest=False, reason="host-qmp-quit"))
        self._quit(os.EX_OK)
        return {}


def _text(arguments: dict[str, Any], key: str) -> str:
    value = arguments.get(key)
    if not isinstance(value, str):
        raise QmpError(f"Parameter '{key}' is missing")
    return value


def _ring(machine: QtestMachine, arguments: dict[str, Any]) -> str:
    name = _text(arguments, "device")
    if name not in machine.rings:
        raise QmpError(f"Device '{name}' not found", "DeviceNotFound")
    return name

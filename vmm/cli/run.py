"""``vmm run``: from flags to a machine, its terminal, and an exit status."""

from __future__ import annotations

import os

from vmm.cli import complain
from vmm.cli.parse import parse
from vmm.config import MachineConfig, load_toml
from vmm.errors import ConfigError
from vmm.settings import SETTINGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main(argv: list[str]) -> int:
    """Gives the exit status; see docs/cli.md."""
    parsed = parse(argv, "run", takes_rest="--")
    given = parsed.values
    if given.get("help"):
        from vmm.cli import help as text

        print(text.of("run"), end="")
        return 0
    run = settings(given, command=bool(parsed.rest))
    if run["verbose"] and run["quiet"]:
        raise ConfigError("--verbose and --quiet contradict each other.")
    config = MachineConfig(**{k: v for k, v in run.items() if k in MachineConfig.__annotations__})
    config.validate()
    for name in ("pwd", "user", "env"):
        if run[name] and config.root is None:
            raise ConfigError(f"--{name} is for a command in the guest, or with --root.")
    if run["dry_run"]:
        from vmm.cli.report import dry_run

        print(dry_run(config, str(run["accel"]), str(run["dry_run"])))
        return 0
    from vmm.cli.accel import choose

    where, why = choose(str(run["accel"]), config)
    if where == "nested":
        # What a command says on stderr is all that programs shall find there.
        if why and not run["quiet"] and (config.root is None or os.isatty(2)):
            complain(f"{why}: running in an appliance instead (vmm nested), which is slower")
        return _nested(config, run, why, parsed.rest)
    if config.root is not None:
        from vmm.cli.command import main as run_command

        return run_command(config, run, parsed.rest)
    from vmm.cli.session import Session

    return Session(config, verbose=bool(run["verbose"]), quiet=bool(run["quiet"])).run()


def settings(given: dict[str, object], *, command: bool = False) -> dict[str, Any]:
    """All settings of ``vmm run``: the table's defaults, the configuration file, the flags.
    ``command``: one is to run in the guest."""
    merged = {row.dest: row.initial() for row in SETTINGS if "run" in row.commands}
    loaded = load_toml(str(given["config"])) if "config" in given else {}
    for dest, value in [*loaded.items(), *given.items()]:
        before = merged[dest]
        merged[dest] = [*before, *value] if isinstance(before, list) else value  # type: ignore[misc]
    if command and merged["root"] is None:
        merged["root"] = "/"
    if merged["root"] is not None:
        return _command_consoles(merged)
    if "serial" not in loaded and "serial" not in given and merged["console"] != "stdio":
        merged["serial"] = "stdio"
    return merged


def _command_consoles(merged: dict[str, Any]) -> dict[str, Any]:
    """The standard streams are the command's; the kernel's log goes by the serial port, which
    works before any driver is loaded."""
    if "stdio" in (merged["serial"], merged["console"]):
        raise ConfigError(
            "With a command or --root the standard streams are the command's; "
            "write the kernel's log to a file: --console FILE."
        )
    if merged["serial"] == "buffer" and merged["console"] != "none":
        merged["serial"], merged["console"] = merged["console"], "none"
    return merged


def _nested(config: MachineConfig, run: dict[str, Any], why: str, command: list[str]) -> int:
    from vmm.cli.accel import run_nested

    flags = [f"--{word}" for word in ("verbose", "quiet") if run[word]]
    if config.root is not None:
        from vmm.cli.command import flags as command_flags

        flags += command_flags(run)
    return run_nested(config, flags, why, verbose=bool(run["verbose"]), command=command)

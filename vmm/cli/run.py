"""``vmm run``: from flags to a machine, its terminal, and an exit status."""

from __future__ import annotations

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
    given = parse(argv, "run").values
    if given.get("help"):
        from vmm.cli import help as text

        print(text.of("run"), end="")
        return 0
    run = settings(given)
    if run["verbose"] and run["quiet"]:
        raise ConfigError("--verbose and --quiet contradict each other.")
    config = MachineConfig(**{k: v for k, v in run.items() if k in MachineConfig.__annotations__})
    config.validate()
    if run["dry_run"]:
        from vmm.cli.report import dry_run

        print(dry_run(config, str(run["accel"]), str(run["dry_run"])))
        return 0
    from vmm.cli.accel import choose

    where, why = choose(str(run["accel"]), config)
    if where == "nested":
        if why and not run["quiet"]:
            complain(f"{why}: running in an appliance instead (vmm nested), which is slower")
        return _nested(config, run, why)
    from vmm.cli.session import Session

    return Session(config, verbose=bool(run["verbose"]), quiet=bool(run["quiet"])).run()


def settings(given: dict[str, object]) -> dict[str, Any]:
    """All settings of ``vmm run``: the table's defaults, the configuration file, the flags."""
    merged = {row.dest: row.initial() for row in SETTINGS if "run" in row.commands}
    loaded = load_toml(str(given["config"])) if "config" in given else {}
    for dest, value in [*loaded.items(), *given.items()]:
        before = merged[dest]
        merged[dest] = [*before, *value] if isinstance(before, list) else value  # type: ignore[misc]
    if "serial" not in loaded and "serial" not in given and merged["console"] != "stdio":
        merged["serial"] = "stdio"
    return merged


def _nested(config: MachineConfig, run: dict[str, Any], why: str) -> int:
    from vmm.cli.accel import run_nested

    flags = [f"--{word}" for word in ("verbose", "quiet") if run[word]]
    return run_nested(config, flags, why, verbose=bool(run["verbose"]))

"""What ``vmm run`` prints about a machine: before it runs, after it ran."""

from __future__ import annotations

import sys

from vmm.cli import complain
from vmm.values import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.config import MachineConfig
    from vmm.machine import Machine
    from vmm.result import RunResult

#: How much of a console that was not on the screen is printed after a failure.
CONSOLE_LINES = 50
#: Reasons after which the guest did not end as it should.
FAILURES = ("panic", "watchdog", "lost", "timeout")


def dry_run(config: MachineConfig, accel: str, form: str) -> str:
    """The machine that would be built, as text or JSON (``form``). Opens no /dev/kvm."""
    from vmm.cli.accel import choose
    from vmm.machine import Machine

    where, why = choose(accel, config)
    facts: dict[str, Any] = {
        "accel": where,
        "accel_reason": why,
        "cpus": config.cpus,
        "cpu": config.cpu,
        "ram": config.memory,
        "serial": config.serial,
        "console": config.console,
        "disks": [str(disk) for disk in config.disks],
        **Machine(_untouched(config)).describe(),
    }
    if form == "json":
        import json

        return json.dumps(facts, indent=2, default=str)
    return "\n".join(_text(facts))


def _untouched(config: MachineConfig) -> MachineConfig:
    """The same machine without what would be felt outside: no terminal, no files written, no
    memory taken."""
    consoles = {name: "buffer" for name in ("serial", "console") if getattr(config, name) != "none"}
    return config.replace(**consoles, prefault=False, hugepages=False, memory_backing="auto")


def _text(facts: dict[str, Any]) -> list[str]:
    """The known facts first, in a fixed order; then whatever else the machine told."""
    why = f" ({facts.pop('accel_reason')})" if facts.get("accel_reason") else ""
    facts.pop("accel_reason", None)
    lines = [f"accel    {facts.pop('accel')}{why}"]
    lines.append(f"cpu      {facts.pop('cpus')} x {facts.pop('cpu')}")
    lines.append(f"memory   {format_size(facts.pop('ram'))}")
    lines += _table("memory map", facts.pop("memory", []), "type")
    lines += _table("devices", facts.pop("devices", []), "name")
    lines += ["command line", f"  {facts.pop('command_line', '')}"]
    for name, value in facts.items():
        if isinstance(value, list):
            # The loader tells these too; they stand above.
            value = [item for item in value if not str(item).startswith(("cmdline", "e820"))]
            lines += [name, *(f"  {item}" for item in value)] if value else []
        elif value not in (None, ""):
            lines.append(f"{name:<8} {value}")
    return lines


def _table(title: str, rows: list[dict[str, Any]], last: str) -> list[str]:
    """Ranges in address order per bus, ``last`` naming each."""
    lines = [title]
    for row in sorted(rows, key=lambda row: (str(row.get("bus", "")), row.get("base", 0))):
        rest = {k: v for k, v in row.items() if k not in ("base", "size", "bus", last)}
        more = "".join(f"  {value}" for value in rest.values() if value is not None)
        bus = f"{row['bus']:<5}" if "bus" in row else ""
        base, size = int(row.get("base", 0)), int(row.get("size", 0))
        where = f"{base:#014x}-{base + size - 1:#014x}  " if size else ""
        lines.append(f"  {bus}{where}{row.get(last, '')}{more}")
    return lines


def explain(machine: Machine, result: RunResult, *, on_screen: bool) -> None:
    """On stderr: what is known of a guest that ended badly, or of any when it is asked for.
    ``on_screen``: its console was there already."""
    # A transport says what its device says: once is enough.
    for sentence in dict.fromkeys(device.unclaimed() for device in machine.devices):
        if sentence:
            complain(sentence)
    if result.diagnosis:
        print(result.diagnosis, file=sys.stderr)
    if result.reason in FAILURES and result.console and not on_screen:
        lines = result.console.splitlines()[-CONSOLE_LINES:]
        complain(f"the console's last {len(lines)} lines:")
        print("\n".join(lines), file=sys.stderr)


def exits(counts: list[tuple[str, int, bool, int, int]]) -> str:
    """The table of --debug-exits, most frequent first. ``counts`` as Machine.exit_counts()."""
    total = sum(count for *_, count, _ in counts)
    cold = sum(row[4] for row in counts)
    lines = [f"{total} exits, {cold} answered by Python ({_percent(cold, total)})"]
    lines.append(f"{'count':>10} {'share':>6} {'Python':>7}  what")
    for reason, addr, is_write, count, slow in counts:
        access = ""
        if reason in ("KVM_EXIT_IO", "KVM_EXIT_MMIO"):
            access = f" {'write' if is_write else 'read'} {addr:#x}"
        lines.append(
            f"{count:>10} {_percent(count, total):>6} {_percent(slow, count):>7}  {reason}{access}"
        )
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "0%"

"""``vmm nested``: a command in an appliance that has a true /dev/kvm."""

from __future__ import annotations

from vmm.cli.parse import parse
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main(argv: list[str]) -> int:
    """Gives the command's exit status."""
    parsed = parse(argv, "nested", takes_rest="any")
    given: dict[str, Any] = parsed.values
    if given.pop("help", False):
        from vmm.cli import help as text

        print(text.of("nested"), end="")
        return 0
    if not parsed.rest:
        raise ConfigError("vmm nested: which command? As in: vmm nested -- make test")
    given.pop("quiet", None)
    given["timeout"] = given.get("timeout") or None
    from vmm import nested

    return nested.run(parsed.rest, nested.Options(**given))

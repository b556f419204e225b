"""Facts about this host that more than one room asks for."""

from __future__ import annotations

#: Set in the environment inside a nested machine, so that nobody nests again by mistake.
NESTED = "VMM_NESTED"

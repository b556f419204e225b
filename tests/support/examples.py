"""How hypothesis works here; imported where examples are, as it takes a while where that counts."""

from __future__ import annotations

from hypothesis import settings

# A busy host takes its time; a test that hangs is ended by its own deadline.
settings.register_profile("vmm", deadline=None)
settings.load_profile("vmm")

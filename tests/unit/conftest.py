"""Examples as the rest of the suite has them."""

from __future__ import annotations

import tests.support.examples  # noqa: F401

"""Tests that run in guests: the pytest plugin (``plugin``), what a failed test tells (``report``),
and the guest's own results turned into pytest's (``tap``)."""

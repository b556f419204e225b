"""Reading what guests' tests print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.testing.tap import parse

TAP13 = """\
TAP version 13
1..4
ok 1 - opens
# expected 3, got 4
not ok 2 - counts
ok 3 reads # SKIP no device
not ok 4 - writes # TODO later
"""

KSELFTEST = """\
TAP version 13
1..2
# timeout set to 45
# selftests: net: a.sh
# TAP version 13
# 1..2
# ok 1 up
# # eth0 was down
# not ok 2 down
not ok 1 selftests: net: a.sh # exit=1
# selftests: net: b.sh
# all is well
ok 2 selftests: net: b.sh
"""

KTAP = """\
KTAP version 1
1..1
  KTAP version 1
  # Subtest: list
  1..2
  ok 1 add
  ok 2 del # SKIP not here
ok 1 list
"""

TAP14 = """\
TAP version 14
# Subtest: first
    ok 1 - a
    not ok 2 - b
      ---
      message: broken
      ...
    1..2
not ok 1 - first
1..1
"""


def brief(text: str) -> list[tuple[str, str]]:
    return [(r.name, r.status) for r in parse(text)]


def test_plain_results() -> None:
    assert brief(TAP13) == [
        ("opens", "passed"),
        ("counts", "failed"),
        ("reads", "skipped"),
        ("writes", "skipped"),
    ]
    _, counts, reads, writes = parse(TAP13)
    assert counts.detail == "# expected 3, got 4"
    assert reads.reason == "no device"
    assert writes.reason == "later"


def test_kselftest_output_is_nested() -> None:
    assert brief(KSELFTEST) == [
        ("selftests: net: a.sh / up", "passed"),
        ("selftests: net: a.sh / down", "failed"),
        ("selftests: net: b.sh", "passed"),
    ]
    assert "# # eth0 was down" in parse(KSELFTEST)[1].detail


def test_kunit_output_is_nested() -> None:
    assert brief(KTAP) == [("list / add", "passed"), ("list / del", "skipped")]


def test_tap_14_subtests() -> None:
    assert brief(TAP14) == [("first / a", "passed"), ("first / b", "failed")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("hello\nworld\n", []),
        ("okay then\nnot okay\n", []),
        ("1..2\nok 1 a\n", [("a", "passed"), ("the plan", "failed")]),
        ("ok\nnot ok\n", [("test 1", "passed"), ("test 2", "failed")]),
        ("1..0 # SKIP no root\n", [("all", "skipped")]),
        ("ok 1 a\nBail out! disk is gone\n", [("a", "passed"), ("Bail out!", "failed")]),
        # It failed and nothing in it did: that is a result of its own.
        ("  ok 1 a\nnot ok 1 t\n", [("t / a", "passed"), ("t", "failed")]),
        # The sum never came.
        ("  ok 1 a\n", [("a", "passed")]),
        ("1..99999999999999999999\n", [("the plan", "failed")]),
    ],
)
def test_odd_output(text: str, expected: list[tuple[str, str]]) -> None:
    assert brief(text) == expected


WORDS = st.sampled_from(
    ["ok", "not ok", " 1", " - a", "1..3", "    ", "  ", "# ", "# SKIP", "\n", "Bail out!", "x"]
)


@given(st.one_of(st.text(), st.lists(WORDS).map("".join)))
def test_any_text_gives_a_list(text: str) -> None:
    for result in parse(text):
        assert result.status in ("passed", "failed", "skipped")
        assert result.name

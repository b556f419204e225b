"""Token buckets: the rate holds whatever is taken, and idle time is worth one burst."""

from __future__ import annotations

import random
from typing import Any

import pytest

from vmm._native import ffi, lib

SECOND = 10**9


def bucket(rate: int, burst: int = 0) -> Any:
    b = ffi.new("struct vmm_bucket *")
    lib.vmm_bucket_set(b, rate, burst)
    return b


def test_no_rate_is_no_limit() -> None:
    b = bucket(0)
    for _ in range(3):
        lib.vmm_bucket_take(b, 5, 1 << 62)
        assert lib.vmm_bucket_wait(b, 5) == 0


def test_a_burst_then_the_rate() -> None:
    b = bucket(1000, 10)
    taken = 0
    while lib.vmm_bucket_wait(b, 1) == 0:
        lib.vmm_bucket_take(b, 1, 1)
        taken += 1
    assert taken == 10
    wait = lib.vmm_bucket_wait(b, 1)
    assert wait <= SECOND // 1000 + 1
    assert lib.vmm_bucket_wait(b, 1 + wait) == 0
    assert lib.vmm_bucket_wait(b, wait) != 0
    lib.vmm_bucket_take(b, 1 + wait, 1)
    assert lib.vmm_bucket_wait(b, 2 + wait) != 0


def test_burst_defaults_to_a_second() -> None:
    b = bucket(100)
    assert b.burst == 100


def test_more_than_the_burst_gets_through_and_is_paid_back() -> None:
    b = bucket(1000, 10)
    assert lib.vmm_bucket_wait(b, 0) == 0
    lib.vmm_bucket_take(b, 0, 5000)
    wait = lib.vmm_bucket_wait(b, 0)
    assert abs(wait - (5 * SECOND - 9 * SECOND // 1000)) <= 2


def test_idle_time_is_worth_no_more_than_the_burst() -> None:
    b = bucket(1000, 10)
    lib.vmm_bucket_take(b, 0, 10)
    now, taken = 3600 * SECOND, 0
    while lib.vmm_bucket_wait(b, now) == 0:
        lib.vmm_bucket_take(b, now, 1)
        taken += 1
    assert taken == 10


@pytest.mark.parametrize("rate", [1, 7, 1000, 333_333, 10**9 + 7, 12_500_000_000])
def test_the_rate_is_exact(rate: int) -> None:
    """10,000 takes as early as allowed: what passed fits the time to the last unit."""
    pick = random.Random(rate)
    burst = max(1, rate // 100)
    b = bucket(rate, burst)
    now = start = pick.randrange(1 << 60)
    total = 0
    for _ in range(10_000):
        now += lib.vmm_bucket_wait(b, now)
        amount = pick.randint(1, 2 * burst)
        last = amount
        lib.vmm_bucket_take(b, now, amount)
        total += amount
    allowed = burst + (now - start) * rate / SECOND
    assert total - last <= allowed + 1
    assert total >= allowed - 1 - rate / 100_000_000 * 10_000 * 2


def test_absurd_amounts_do_not_overflow() -> None:
    b = bucket(1, 1)
    for _ in range(4):
        lib.vmm_bucket_take(b, 1 << 62, (1 << 64) - 1)
    assert lib.vmm_bucket_wait(b, 1 << 62) > 0
    b = bucket((1 << 64) - 1, (1 << 64) - 1)
    lib.vmm_bucket_take(b, 0, (1 << 64) - 1)
    assert lib.vmm_bucket_wait(b, 0) <= SECOND + 1

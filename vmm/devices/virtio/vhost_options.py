"""What a user may say about every vhost-user device, and how it is written."""

from __future__ import annotations

from vmm.options import Field
from vmm.values import parse_count, parse_duration, parse_path

#: As often as this a new back end is looked for at most, in seconds.
RECONNECT_MIN = 0.1


def _parse_reconnect(text: str) -> float:
    seconds = parse_duration(text)
    if seconds and seconds < RECONNECT_MIN:
        raise ValueError(f"must be at least {RECONNECT_MIN} seconds, or 0 for never")
    return seconds


def _parse_queue_size(text: str) -> int:
    size = parse_count(text)
    if size & (size - 1) or not 2 <= size <= 32768:
        raise ValueError("must be a power of two from 2 to 32768")
    return size


SOCKET = Field(
    "socket", "where the back end listens", parse_path, metavar="SOCKET", first=True,
    required=True, path=True,
)  # fmt: skip
RECONNECT = Field(
    "reconnect",
    "look for a new back end every so many seconds when it died; 0: never",
    _parse_reconnect,
    metavar="SECONDS",
    default=0.0,
)


def queue_size(default: int) -> Field:
    return Field(
        "queue-size", "descriptors of a queue", _parse_queue_size,
        metavar="N", default=default,
    )  # fmt: skip

"""What goes in and comes out of ``vmm nested``, byte for byte."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nested.conftest import DEADLINE, Start, command, environment, nested

pytestmark = pytest.mark.timeout(DEADLINE + 20)


def test_streams_are_separate_and_the_status_passes() -> None:
    done = nested("--", "sh", "-c", "echo to-out; echo to-err >&2; exit 7")
    assert (done.status, done.out, done.err) == (7, b"to-out\n", b"to-err\n")


def test_bytes_are_exact_both_ways() -> None:
    data = os.urandom(3_000_000) + bytes(range(256)) + b"\r\n\x03\x04\x1d\x1d\x1d"
    copy = "import sys; d = sys.stdin.buffer.read(); sys.stdout.buffer.write(d);"
    copy += "sys.stderr.buffer.write(d[::-1])"
    done = nested("--", sys.executable, "-c", copy, stdin=data)
    assert done.status == 0
    assert hashlib.sha256(done.out).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(done.err).digest() == hashlib.sha256(data[::-1]).digest()


def test_a_hundred_megabytes_through_stdout() -> None:
    done = nested("--", "head", "-c", "100000000", "/dev/zero")
    assert (done.status, len(done.out), done.out.count(0)) == (0, 100_000_000, 100_000_000)


def test_both_streams_into_one_pipe_keep_their_order() -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo o$i; echo e$i >&2; done"
    done = subprocess.run(
        command("--", "sh", "-c", script),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        timeout=DEADLINE,
        check=False,
    )
    assert done.stdout.split() == [f"{s}{i}".encode() for i in range(1, 10) for s in "oe"]


def test_stdin_ends_where_it_ends(start: Start) -> None:
    process = start("--", "sh", "-c", "read line; echo got $line; cat; echo end")
    assert process.stdin
    assert process.stdout
    process.stdin.write(b"first\n")
    assert process.stdout.readline() == b"got first\n"  # before stdin ends
    process.stdin.write(b"second")
    process.stdin.close()
    assert process.stdout.read() == b"secondend\n"
    assert process.wait(DEADLINE) == 0


def test_a_command_that_does_not_read_its_stdin(start: Start) -> None:
    process = start("--", "sh", "-c", "exec <&-; echo deaf")
    assert process.stdout
    assert process.stdout.readline() == b"deaf\n"
    assert process.wait(DEADLINE) == 0  # though our end of its stdin is still open


def test_closed_standard_streams() -> None:
    """Nothing of ours may end up as the command's stdin, and nothing may hang."""
    line = " ".join(command("--", "sh", "-c", "'cat; echo still here >&2; exit 4'"))
    done = subprocess.run(
        ["sh", "-c", f"{line} <&- >&-"],
        stderr=subprocess.PIPE,
        env=environment(),
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (4, b"still here\n")


def test_a_reader_that_goes_away_is_a_broken_pipe(start: Start) -> None:
    process = start("--", "sh", "-c", "yes; echo $? >&2")
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(2) == b"y\n"
    process.stdout.close()
    assert process.stderr.readline() == b"141\n"


def test_output_to_a_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with open(target, "ab") as file:
        file.write(b"before\n")
        file.flush()
        subprocess.run(
            command("--", "seq", "20000"),
            stdin=subprocess.DEVNULL,
            stdout=file,
            env=environment(),
            timeout=DEADLINE,
            check=True,
        )
    lines = target.read_text().split()
    assert lines == ["before", *map(str, range(1, 20001))]


def test_what_the_command_leaves_behind_ends_with_it() -> None:
    done = nested("--", "sh", "-c", "sleep 1000 & setsid sleep 1000 & echo bye")
    assert (done.status, done.out) == (0, b"bye\n")

"""TAP and KTAP, the forms in which tests tell their results: TAP 13 and 14, kselftest's output.

Written by a guest, so nothing in it is trusted: any text gives a list, nothing raises.
"""

from __future__ import annotations

import re

#: "ok 3 - name # SKIP why", behind the marks of nesting.
_RESULT = re.compile(r"(not ok|ok)\b(?: +(\d+))?(?: +-)?(?: +(.*))?$")
_PLAN = re.compile(r"1\.\.(\d+)(?: *# *(?i:skip)\S*(?: +(.*))?)?\s*$")
#: What a result's name ends at: a directive, or a remark such as kselftest's "# exit=1".
_REMARK = re.compile(r"(?:^|\s)# *((skip|todo|xfail)\b:?)?(.*)$", re.IGNORECASE)
#: A level of nesting: four spaces (TAP 14), two (KTAP), or "# " (kselftest).
_NESTING = re.compile(r"(?: {2}|# )*")
_SUBTEST = re.compile(r"# *Subtest:? *(.*)$")
_BAIL = re.compile(r"Bail out!\s*(.*)$")

_MAX_RESULTS = 100_000
_MAX_DETAIL = 200  # lines kept for one result


class TapResult:
    """One result: ``name`` with those above it, joined by " / "; ``status`` 'passed', 'failed' or
    'skipped'; ``reason`` of a skip, or what the directive says; ``detail`` the lines before it that
    are its own."""

    __slots__ = ("detail", "name", "reason", "status")

    def __init__(self, name: str, status: str, reason: str = "", detail: str = "") -> None:
        self.name = name
        self.status = status
        self.reason = reason
        self.detail = detail

    def __repr__(self) -> str:
        return f"<{self.name}: {self.status}>"


class _Level:
    """A list of results that is being read."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.results: list[TapResult] = []
        self.seen = 0
        self.planned: int | None = None

    def end(self) -> list[TapResult]:
        """All of it, and whether all of it came."""
        if self.planned is not None and self.seen != self.planned:
            text = f"{self.planned} results were promised, {self.seen} came"
            self.results.append(TapResult("the plan", "failed", text))
        return self.results


def parse(text: str) -> list[TapResult]:
    """The results in what a test printed, in order; those of the innermost tests where tests are
    nested. Without any line that is TAP the list is empty."""
    levels = [_Level(0)]
    detail: list[str] = []
    total = 0
    for raw in text.splitlines():
        line = raw.rstrip()
        found = _match(line)
        if found is None:
            if len(detail) < _MAX_DETAIL and line:
                detail.append(line)
            continue
        depth, kind, match = found
        while len(levels) > 1 and levels[-1].depth > depth and kind != "result":
            _close(levels)
        if depth > levels[-1].depth:
            levels.append(_Level(depth))
        level = levels[-1]
        if kind == "plan":
            level.planned = int(match[1][:9])
            if not level.planned and match[2] is not None:
                level.results.append(TapResult("all", "skipped", match[2]))
        elif kind == "bail":
            level.results.append(TapResult("Bail out!", "failed", match[1], "\n".join(detail)))
        elif total < _MAX_RESULTS:
            total += 1
            _add(levels, depth, match, detail)
            detail = []
    while len(levels) > 1:
        _close(levels)
    return levels[0].end()


def _match(line: str) -> tuple[int, str, re.Match[str]] | None:
    """How deep, what, and its parts."""
    nesting = _NESTING.match(line)
    start = nesting.end() if nesting else 0
    depth = line[:start].count("  ") + line[:start].count("# ")
    for kind, pattern in (("result", _RESULT), ("plan", _PLAN), ("bail", _BAIL)):
        match = pattern.match(line, start)
        if match:
            return depth, kind, match
    return None


def _close(levels: list[_Level]) -> None:
    """A level that ended without a result that sums it up: its results stand for themselves."""
    inner = levels.pop()
    levels[-1].results += inner.end()


def _add(levels: list[_Level], depth: int, match: re.Match[str], detail: list[str]) -> None:
    """One result; if tests were nested in it, they come in its stead."""
    inner: list[TapResult] = []
    while len(levels) > 1 and levels[-1].depth > depth:
        deeper = levels.pop()
        inner = deeper.end() + inner
    level = levels[-1]
    level.seen += 1
    text = match[3] or ""
    remark = _REMARK.search(text)
    name = (text[: remark.start()] if remark else text).strip()
    name = name or f"test {match[2] or level.seen}"
    status = "passed" if match[1] == "ok" else "failed"
    word = (remark[2] or "").lower() if remark else ""
    reason = remark[3].strip() if remark else ""
    if word == "skip":
        status = "skipped"
    elif word in ("todo", "xfail") and status == "failed":
        status, reason = "skipped", reason or "it is known to fail"
    for result in inner:
        result.name = f"{name} / {result.name}"
    failed_inside = any(result.status == "failed" for result in inner)
    level.results += inner
    if not inner or (status == "failed" and not failed_inside):
        level.results.append(TapResult(name, status, reason, "\n".join(_own(detail))))


def _own(detail: list[str]) -> list[str]:
    """Without what only says that a subtest begins, or which version of TAP it is."""
    skip = ("TAP version", "KTAP version")
    plain = [line.strip() for line in detail]
    return [
        line
        for line in plain
        if not _SUBTEST.match(line) and not line.removeprefix("# ").startswith(skip)
    ]

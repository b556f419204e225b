"""The static program that is process 1 in a guest: finds it, builds it when its source is newer."""

from __future__ import annotations

import os
import sys

from vmm.arch.base import native_name
from vmm.errors import HostError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SOURCES = os.path.join(os.path.dirname(_PACKAGE), "guests", "init")
_FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Os", "-static", "-s")


def _binary() -> str:
    return os.path.join(_PACKAGE, "data", f"init-{native_name()}")


def init_path() -> str:
    """The path of a static /init for guests of this host, built now if need be.

    An installed package brings it along; a checkout builds it with gcc. HostError when neither
    is possible.
    """
    sources, binary = _source_files(), _binary()
    if os.path.exists(binary) and _newest(sources) <= os.path.getmtime(binary):
        return binary
    if not sources:
        raise HostError(f"{binary} is missing from this installation of vmm: install it again")
    return build_init()


def build_init() -> str:
    """Compile guests/init into the package and return the path; in the cache if that is read-only.

    Called by the Makefile and before a wheel is built. HostError when there is no compiler or it
    fails.
    """
    import shutil
    import subprocess

    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None:
        raise HostError(
            f"Building the guest's /init needs {compiler}: install gcc and libc6-dev (Debian)"
        )
    target = _binary()
    if not _is_writable(os.path.dirname(target)):
        from vmm.guest.cache import cache_dir

        target = os.path.join(cache_dir(), "init", os.path.basename(target))
        if os.path.exists(target) and _newest(_source_files()) <= os.path.getmtime(target):
            return target
        os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{os.getpid()}"
    argv = [compiler, *_FLAGS, "-o", partial, *_c_files()]
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(result.stderr, end="", file=sys.stderr)
        raise HostError(f"{compiler} could not build the guest's /init from {_SOURCES}")
    os.replace(partial, target)
    return target


def _source_files() -> list[str]:
    try:
        names = os.listdir(_SOURCES)
    except OSError:
        return []
    return sorted(os.path.join(_SOURCES, name) for name in names if name.endswith((".c", ".h")))


def _c_files() -> list[str]:
    return [path for path in _source_files() if path.endswith(".c")]


def _newest(paths: list[str]) -> float:
    return max((os.path.getmtime(path) for path in paths), default=0.0)


def _is_writable(directory: str) -> bool:
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


if __name__ == "__main__":
    init_path()

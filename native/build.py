"""Builds ``vmm._native``: every .c file here, in cffi API mode.

What Python may see of a C header stands between ``/* cdef: begin */`` and ``/* cdef: end */``;
those parts are handed to cffi as they are, so nothing is declared twice. ``*.cdef`` files name
what comes from the kernel's own headers, where the compiler supplies numbers and layouts; of
``arch_*.cdef`` only that of the machine it is built for is taken.

``VMM_SANITIZE=1`` builds with ASan and UBSan.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"

WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
# cffi's generated glue is not ours to make warning-free.
GLUE = ["-Wno-missing-field-initializers", "-Wno-unused-parameter", "-Wno-sign-compare"]


def cdefs() -> str:
    here = f"arch_{os.uname().machine}.cdef"
    names = sorted(NATIVE.glob("*.cdef"))
    parts = [p.read_text() for p in names if not p.name.startswith("arch_") or p.name == here]
    for path in headers():
        parts += re.findall(
            r"/\* cdef: begin \*/(.*?)/\* cdef: end \*/", path.read_text(), re.DOTALL
        )
    return "\n".join(parts)


def headers() -> list[Path]:
    """core.h first: the others build on it."""
    return sorted(NATIVE.glob("*.h"), key=lambda p: (p.name != "core.h", p.name))


def make() -> FFI:
    ffi = FFI()
    ffi.cdef(cdefs())
    sanitize = os.environ.get("VMM_SANITIZE") == "1"
    flags = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]
    ffi.set_source(
        "vmm._native",
        "\n".join(
            ["#include <sys/ioctl.h>", "#include <linux/kvm.h>", "#include <sys/mman.h>"]
            + [f'#include "{path.name}"' for path in headers()]
        ),
        sources=[str(path.relative_to(ROOT)) for path in sorted(NATIVE.glob("*.c"))],
        depends=[str(path.relative_to(ROOT)) for path in headers()],
        include_dirs=["native"],
        extra_compile_args=WARNINGS + GLUE + (flags if sanitize else ["-O2", "-g"]),
        extra_link_args=["-pthread"] + (flags[:1] if sanitize else []),
    )
    return ffi


os.chdir(ROOT)
ffibuilder = make()

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose="-v" in sys.argv)

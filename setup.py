"""The part of the build that pyproject.toml cannot say: the cffi module, and the guest's /init."""

import os
import sys

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Compiles the static /init, which is package data, before the package is collected."""

    def run(self) -> None:
        if os.uname().machine == "x86_64":
            sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
            from vmm.guest.initbin import init_path

            init_path()
        super().run()


setup(cffi_modules=["native/build.py:ffibuilder"], cmdclass={"build_py": BuildPy})

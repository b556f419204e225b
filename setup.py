"""The part of the build that pyproject.toml cannot say: the cffi module."""

from setuptools import setup

setup(cffi_modules=["native/build.py:ffibuilder"])

"""Prints what pyproject.toml asks for, one requirement a word: for pip, before vmm is built."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
print(
    *(r.replace(" ", "") for r in project["dependencies"] + project["optional-dependencies"]["dev"])
)

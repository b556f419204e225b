"""Devices by name: their options read and printed, and found wherever they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm import MachineConfig, options
from vmm.board import Board
from vmm.catalog import DeviceSpec, builtins, parse
from vmm.cli.help import of
from vmm.cli.parse import parse as parse_argv
from vmm.config import load_toml
from vmm.errors import ConfigError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory
from vmm.options import Field
from vmm.settings import device_setting
from vmm.values import parse_count

FIELDS = (
    Field("kind", "", choices=("tap", "user"), first=True),
    Field("queues", "", parse_count, default=1),
    Field("file", "", path=True),
    Field("ro", "", None, default=False),
    Field("forward", "", repeatable=True),
)

OWN = """
from vmm.device import Device
from vmm.options import Field

class Lamp(Device):
    HELP = "A lamp."
    OPTIONS = (Field("colour", "of its light", default="red"), Field("file", "", path=True))

    @classmethod
    def from_options(cls, options, board):
        lamp = cls()
        lamp.colour = options.colour
        return lamp

class NotOne:
    pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "lamp,2.py"
    path.write_text(OWN)
    return f"{path}:Lamp".replace(",", ",,")


def read(text: str, base: str | None = "/base") -> options.Options:
    return options.read("net", FIELDS, text, base)


def test_options_are_read() -> None:
    got = read("tap,queues=4,file=a,,b,ro,forward=1:2,forward=3:4")
    assert (got.kind, got.queues, got.file, got.ro, got.forward) == (
        "tap", 4, "/base/a,b", True, ["1:2", "3:4"],
    )  # fmt: skip
    empty = read("")
    assert (empty.kind, empty.queues, empty.file, empty.ro, empty.forward) == (
        None, 1, None, False, [],
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "user", "kind=tap,ro=off", "user,file=/x,,y,forward=a,forward=b", "queues=2"]
)
def test_options_print_what_reads_back(text: str) -> None:
    once = str(read(text))
    assert str(read(once, "/elsewhere")) == once


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bridge", "kind must be one of tap, user"),
        ("user,quues=2", "'quues' is not an option of net"),
        ("user,queues=x", "queues not a whole number"),
        ("user,queues", "queues needs a value: queues=QUEUES"),
        ("user,queues=1,queues=2", "queues is given twice"),
        ("user,ro=maybe", "ro must be on or off"),
        ("user,file=a\0b", "NUL"),
        ("user,", "'' is not an option"),
    ],
)
def test_options_that_are_wrong(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        read(text)
    assert said in str(e.value)
    assert "--net" in str(e.value)


def test_a_required_option() -> None:
    with pytest.raises(ConfigError, match="path=PATH is missing"):
        options.read("pmem", (Field("path", "", required=True),), "")


def test_usage() -> None:
    assert options.usage(FIELDS) == (
        "tap|user[,queues=QUEUES][,file=FILE][,ro][,forward=FORWARD]..."
    )


def test_a_class_of_ones_own(own: str, tmp_path: Path) -> None:
    spec = parse(f"{own},colour=blue,file=x", str(tmp_path))
    assert spec.cls.__name__ == "Lamp"
    assert (spec.options.colour, spec.options.file) == ("blue", f"{tmp_path}/x")
    assert parse(str(spec), "/") == spec
    assert parse(own) != spec


def test_a_class_of_ones_own_is_plugged(own: str) -> None:
    config = MachineConfig(devices=[own, f"{own},colour=blue"])
    memory = GuestMemory([(0, 1 << 20)])
    board = Board(config, memory, IrqChip())
    board.plug_users()
    assert [(d.name, vars(d)["colour"]) for d in board.devices] == [
        ("lamp0", "red"),
        ("lamp1", "blue"),
    ]
    board.close()
    memory.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no-such-device", "there is no such device"),
        ("no.such.module:X", "importing it raised ModuleNotFoundError"),
        ("vmm.errors:VmmError", "there is no such device"),
        ("/no/file.py:X", "loading it raised FileNotFoundError"),
        ("../../etc/passwd", "there is no such device"),
        ("", "there is no such device"),
    ],
)
def test_devices_that_are_not(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse(text)
    assert said in str(e.value)


def test_a_file_that_raises(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("1/0")
    for _ in range(2):
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            parse(f"{path}:X")


def test_everywhere_the_same(own: str, tmp_path: Path) -> None:
    """Flag, configuration file and keyword."""
    text = f"{own},file=x"
    path = tmp_path / "vm.toml"
    path.write_text(f'device = ["{text}"]')
    by_file = load_toml(str(path))["devices"]
    assert [str(spec) for spec in by_file] == [str(parse(text, str(tmp_path)))]  # type: ignore[attr-defined]
    by_flag = parse_argv(["--device", text, "-device", own], "run").values["devices"]
    config = MachineConfig(devices=[text, own])
    assert config.devices == by_flag
    assert config.to_argv() == [f"--device={d}" for d in config.devices]
    assert MachineConfig(**config.as_dict()) == config  # type: ignore[arg-type]


def test_an_object_is_a_device(own: str) -> None:
    lamp = parse(own).cls()
    config = MachineConfig(devices=lamp)
    assert config.devices == [lamp]
    with pytest.raises(ConfigError, match="was made in this process"):
        config.to_argv()


def test_every_device_of_vmms_own_has_flag_help_and_keyword() -> None:
    text = of("run")
    for name, cls in builtins().items():
        assert cls.HELP, name
        assert all(field.help for field in cls.OPTIONS), name
        row = device_setting(name)
        assert row is not None
        assert f"--{name}" in text
        assert device_setting(name.replace("-", "_")) is not None


def test_no_keyword_of_a_device_that_is_not() -> None:
    with pytest.raises(ConfigError, match="not a setting of a machine"):
        MachineConfig(lamp=True)
    assert isinstance(DeviceSpec.__doc__, str)

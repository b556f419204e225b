"""Flags, help and dispatch of the command line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vmm import __version__, cli
from vmm.cli import help as text
from vmm.cli import run
from vmm.cli.parse import parse
from vmm.config import MachineConfig
from vmm.disk import DiskSpec
from vmm.errors import ConfigError
from vmm.qtest import options as qtest_options
from vmm.settings import SETTINGS, SWITCH, of_command

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def values(*argv: str) -> dict[str, object]:
    return parse(list(argv), "run").values


@pytest.mark.parametrize(
    "argv",
    [
        ("--memory", "1G"),
        ("--memory=1G",),
        ("-m", "1G"),
        ("-m1G",),
        ("--mem", "1G"),
        ("-m", "1024"),
        ("-memory", "1G"),
    ],
)
def test_spellings_of_a_value(argv: tuple[str, ...]) -> None:
    assert values(*argv) == {"memory": 1 << 30}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("-kernel", "k"), {"kernel": "k"}),
        (("-kk",), {"kernel": "k"}),
        (("--kimg=k",), {"kernel": "k"}),
        (("-initrd", "a", "-i", "b"), {"initrds": ["a", "b"]}),
        (("-append", "a=b", "--params", "c"), {"append": ["a=b", "c"]}),
        (("--append=a=b",), {"append": ["a=b"]}),
        (("-smp", "4"), {"cpus": 4}),
        (("-p4",), {"cpus": 4}),
        (("-accel", "kvm"), {"accel": "kvm"}),
        (("-serial", "mon:stdio"), {"serial": "stdio"}),
        (("--console", "file:x"), {"console": "x"}),
        (("-d", "x,ro"), {"disks": [DiskSpec("x", read_only=True)]}),
        (("--no-rng",), {"rng": False}),
        (("--rng",), {"rng": True}),
        (("--no-prefault",), {"prefault": False}),
        (("-vq",), {"verbose": True, "quiet": True}),
        (("-vm1G",), {"verbose": True, "memory": 1 << 30}),
        (("--dry-run",), {"dry_run": "text"}),
        (("--dry-run=json",), {"dry_run": "json"}),
        (("--append", "--quiet"), {"append": ["--quiet"]}),
        (("--append", "-- x"), {"append": ["-- x"]}),
        (("--append=",), {"append": [""]}),
        (("-m", "1G", "-m", "2G"), {"memory": 2 << 30}),
        ((), {}),
    ],
)
def test_conventions(argv: tuple[str, ...], expected: dict[str, object]) -> None:
    assert values(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--memroy", "1G"), "Did you mean --memory?"),
        (("--mem0ry=1G",), "Did you mean --memory?"),
        (("--memo=1G",), "--memo is not a flag"),
        (("-z",), "-z is not a flag"),
        (("-vz",), "-z is not a flag"),
        (("--memory",), "--memory needs a value: --memory SIZE."),
        (("-m",), "-m needs a value"),
        (("--quiet=yes",), "takes no value"),
        (("--dry-run=xml",), "must be one of text, json"),
        (("--no-kernel",), "is not a flag"),
        (("--no-help",), "is not a flag"),
        (("-m", "x"), "-m x: not a size"),
        (("vmlinuz",), "Did you mean --kernel vmlinuz?"),
        (("--", "ls"), "nothing may follow --"),
        (("-",), "takes flags only"),
        (("",), "takes flags only"),
        (("--",), "nothing may follow --"),
    ],
)
def test_wrong_use(argv: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        values(*argv)
    assert sentence in str(caught.value)


def test_a_command_follows_the_flags_of_nested() -> None:
    parsed = parse(["--rw", "a", "-e", "X=1", "make", "-j", "--", "x"], "nested", takes_rest=True)
    assert parsed.values == {"rw": ["a"], "env": ["X=1"]}
    assert parsed.rest == ["make", "-j", "--", "x"]
    assert parse(["-c2", "--", "-x"], "nested", takes_rest=True).rest == ["-x"]
    assert parse([], "nested", takes_rest=True).rest == []


def test_every_flag_of_every_row_is_parsed() -> None:
    samples = {"memory": "1G", "cpus": "2", "timeout": "3", "console_limit": "1", "cpu": "host"}
    samples |= {"devices": "vmm.devices.port80:Port80", "io_cpus": "0-1", "io_poll": "9"}
    for command in ("run", "nested", "doctor"):
        for row in of_command(command):
            value = samples.get(row.dest, row.choices[0] if row.choices else "x")
            for flag in [*row.flags, *row.aliases]:
                argv = [flag] if row.kind != "value" else [flag, value]
                assert list(parse(argv, command).values) == [row.dest]


def test_help_is_complete() -> None:
    for command in ("run", "nested", "doctor"):
        shown = text.of(command)
        words = re.sub(r"\s+", " ", shown)
        for row in of_command(command):
            assert f"  {text.spelling(row)}\n" in shown
            assert re.sub(r"\s+", " ", text.details(row)) in words
            if row.default not in (None, False) and row.dest != "help":
                assert "default: " in text.details(row), row.dest
        assert max(map(len, shown.splitlines())) <= 100


def test_the_document_is_current() -> None:
    """Else: python -m vmm.cli.help > docs/cli.md"""
    assert (ROOT / "docs/cli.md").read_text() == text.document()


def test_the_document_names_every_row() -> None:
    document = text.document()
    for row in SETTINGS:
        assert text.spelling(row).replace("|", "\\|") in document


def test_examples_of_the_help_are_valid() -> None:
    import shlex

    for command, lines in text.EXAMPLES.items():
        for line in lines:
            program, name, *argv = shlex.split(line)
            assert (program, name) == ("vmm", command)
            if command == "qtest":
                qtest_options.parse(argv)
            else:
                parse(argv, command, takes_rest={"nested": "any", "run": "--"}.get(command, ""))


def main(*argv: str) -> int:
    return cli.main(list(argv))


def test_no_arguments_is_short_help_and_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Usage: vmm COMMAND")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--version") == 0
    assert capsys.readouterr().out == f"vmm {__version__}\n"
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{__version__}"\n' in pyproject


@pytest.mark.parametrize("argv", [["help"], ["--help"], ["-h"]])
def test_overview(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*argv) == 0
    for command in cli.COMMANDS:
        assert f"vmm {command}" in capsys.readouterr().out or command != "run"


@pytest.mark.parametrize("command", ["run", "nested", "doctor"])
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("help", command) == 0
    by_help = capsys.readouterr().out
    assert by_help.startswith(f"Usage: vmm {command}")
    assert main(command, "--help") == 0
    assert capsys.readouterr().out == by_help


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("rum") == 2
    assert "Did you mean run?" in capsys.readouterr().err
    assert main("help", "nest") == 2
    assert "Did you mean nested?" in capsys.readouterr().err


def test_usage_errors_are_sentences_not_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("run", "--bogus") == 2
    assert main("run") == 2
    assert main("run", "-k", "x", "-c", "0", "-m", "0") == 2
    assert main("run", "-k", "x", "-v", "-q") == 2
    assert main("nested") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(line.startswith("vmm: ") for line in said.splitlines())
    assert "--cpus 0" in said
    assert "--memory 0B" in said


def test_a_fault_of_vmm_is_told_as_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(argv: list[str]) -> int:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(run, "main", broken)
    assert main("run") == 70
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "please report it" in said


def test_ctrl_c_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "main", interrupted)
    assert main("run") == 130


def test_settings_of_file_and_flags_together(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text(
        'kernel = "k"\nmemory = "1G"\nappend = ["a"]\nrng = false\ndisk = "d.img"\nverbose = true\n'
    )
    given = values("--config", str(file), "-m", "2G", "-a", "b", "--rng", "-d", "e.img")
    merged = run.settings(given)
    assert merged["memory"] == 2 << 30
    assert merged["append"] == ["a", "b"]
    assert merged["rng"] is True
    assert merged["verbose"] is True
    assert merged["kernel"] == f"{tmp_path}/k"
    assert merged["disks"] == [DiskSpec(f"{tmp_path}/d.img"), DiskSpec("e.img")]


def test_the_serial_port_is_the_terminal_unless_told_otherwise(tmp_path: Path) -> None:
    def serial(*argv: str) -> object:
        return run.settings(values(*argv))["serial"]

    assert serial() == "stdio"
    assert serial("--console", "pty") == "stdio"
    assert serial("--console", "stdio") == "buffer"
    assert serial("--serial", "none") == "none"
    (tmp_path / "f").write_text('serial = "pty"')
    assert serial("--config", str(tmp_path / "f")) == "pty"


def test_to_argv_is_understood_again() -> None:
    config = MachineConfig(
        kernel="/k", initrds=["/a", "/b"], append=["x y", "z"], memory="1.5G", cpus=3, rng=False,
        cpu="host,-x2apic", disks=["/d,,e,ro,serial=s"], console="pty", timeout=2.5, acpi=False,
        transport="mmio", default_append=False, console_limit=4096, debug_exits=True,
    )  # fmt: skip
    again = MachineConfig(**values(*config.to_argv()))
    assert again == config


def test_switches_have_twins_only_where_a_file_can_set_them() -> None:
    for row in of_command("run"):
        if row.kind == SWITCH and row.machine:
            assert values("--no-" + row.name[2:]) == {row.dest: False}

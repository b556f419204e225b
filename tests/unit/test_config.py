"""MachineConfig and the settings table agree with each other."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from vmm import config as config_module
from vmm.config import MachineConfig, load_toml
from vmm.disk import DiskSpec
from vmm.errors import ConfigError
from vmm.settings import OPTIONAL, SETTINGS, SWITCH, machine_settings

MIB = 1 << 20


def keywords() -> list[str]:
    """The keyword-only arguments written out for type checkers."""
    tree = ast.parse(inspect.getsource(config_module))
    typed = next(
        f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "__init__"
    )
    return [arg.arg for arg in typed.args.kwonlyargs]


def test_keywords_written_for_type_checkers_are_the_tables() -> None:
    assert keywords() == list(MachineConfig.__annotations__)
    assert sorted(keywords()) == sorted(row.dest for row in machine_settings())


def test_defaults_written_for_type_checkers_are_the_tables() -> None:
    tree = ast.parse(inspect.getsource(config_module))
    typed = next(
        f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "__init__"
    )
    defaults = dict(zip(keywords(), typed.args.kw_defaults, strict=True))
    for row in machine_settings():
        node = defaults[row.dest]
        assert node is not None
        written = ast.literal_eval(node)
        if written is not ...:
            assert written == (() if row.repeatable else row.default), row.dest


def test_flags_are_unique_and_rows_complete() -> None:
    seen: dict[str, str] = {}
    for row in SETTINGS:
        for flag in [*row.flags, *row.aliases]:
            for command in row.commands:
                key = f"{command} {flag}"
                assert key not in seen, f"{flag} is both {row.dest} and {seen[key]}"
                seen[key] = row.dest
        assert row.help.endswith((".", ")"))
        assert row.kind == SWITCH or row.metavar or row.choices, row.dest
        if row.choices and row.default is not None:
            assert row.default in row.choices


def test_text_means_what_the_command_line_means_and_numbers_the_plain_unit() -> None:
    assert MachineConfig(memory="512").memory == 512 * MIB
    assert MachineConfig(memory=512 * MIB).memory == 512 * MIB
    assert MachineConfig(memory="2G").memory == 2048 * MIB
    assert MachineConfig(timeout="5m").timeout == 300
    assert MachineConfig(timeout=2.5).timeout == 2.5
    assert MachineConfig(timeout="0").timeout is None
    assert MachineConfig(cpus="4").cpus == 4
    assert MachineConfig(append="a b").append == ["a b"]
    assert MachineConfig(initrds=["a", Path("b")]).initrds == ["a", "b"]
    assert MachineConfig(kernel=Path("vmlinuz")).kernel == "vmlinuz"
    assert MachineConfig(disks=[Path("a,b"), "c,ro"]).disks == [
        DiskSpec("a,b"),
        DiskSpec("c", read_only=True),
    ]
    assert MachineConfig(console=Path("none")).console == "./none"


def test_two_configs_share_no_list() -> None:
    a, b = MachineConfig(), MachineConfig()
    a.append.append("x")
    assert b.append == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"memroy": "1G"}, "Did you mean memory?"),
        ({"memory": 1.5}, "expected str or int"),
        ({"memory": True}, "expected str or int"),
        ({"memory": "lots"}, "--memory lots: not a size"),
        ({"cpus": "two"}, "not a number of vCPUs"),
        ({"cpus": "console=ttyS0"}, "kernel parameters go to --append"),
        ({"rng": "yes"}, "expected bool"),
        ({"transport": "isa"}, "must be one of pci, mmio"),
        ({"cpu": "Haswell"}, "the only CPU model"),
        ({"cpu": "host,pcid"}, "with + or -"),
        ({"kernel": 5}, "kernel: expected str"),
        ({"disks": ["a,rw"]}, "'rw' is not an option of disk"),
        ({"disks": ["a,serial=123456789012345678901"]}, "1 to 20 ASCII"),
    ],
)
def test_bad_keywords_are_config_errors(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig(**given)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"kernel": None}, "No kernel"),
        ({"memory": 4096}, "RAM must be from 1M"),
        ({"memory": -1}, "RAM must be from 1M"),
        ({"memory": "65T"}, "RAM must be from 1M to 64T"),
        ({"memory": (1 << 20) + 1}, "multiple of 4K"),
        ({"memory": "3M", "hugepages": True}, "multiple of 2M"),
        ({"hugepages": True, "memory_backing": "anon"}, "contradict"),
        ({"cpus": 0}, "1 to 1024"),
        ({"cpus": 1025}, "1 to 1024"),
        ({"timeout": -1}, "more than 0"),
        ({"timeout": float("nan")}, "more than 0"),
        ({"serial": "stdio", "console": "stdio"}, "cannot both be on stdio"),
        ({"serial": "f", "console": "f"}, "cannot both write to f"),
        ({"append": "a\nb"}, "one line"),
        ({"name": ""}, "printable"),
        ({"disks": ["a", "a"]}, "given twice"),
        ({"io_poll": 2_000_000}, "from 0 to 1000000"),
    ],
)
def test_validate_names_each_problem(given: dict[str, object], sentence: str) -> None:
    config = MachineConfig(**{"kernel": "k", **given})
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert sentence in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_validate_tells_everything_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        MachineConfig(cpus=0, memory=1).validate()
    assert len(str(caught.value).splitlines()) == 3
    config = MachineConfig(kernel="k")
    assert config.validate() is config


def test_to_argv_is_absolute_and_minimal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert MachineConfig(kernel="k").to_argv() == [f"--kernel={tmp_path}/k"]
    argv = MachineConfig(
        kernel="/k", memory="1G", rng=False, timeout=1.5, disks=["a,ro"], console="none"
    ).to_argv()
    assert argv == [
        "--kernel=/k",
        "--memory=1G",
        f"--disk={tmp_path}/a,ro",
        "--no-rng",
        "--timeout=1.5",
    ]


def test_hugepages_is_short_for_a_backing() -> None:
    config = MachineConfig(kernel="k", hugepages=True)
    assert config.memory_backing == "hugetlb"
    assert config.validate().to_argv()[1:] == ["--memory-backing=hugetlb", "--hugepages"]


def test_replace_and_repr() -> None:
    config = MachineConfig(kernel="k", memory="1G")
    other = config.replace(cpus=2)
    assert (other.kernel, other.cpus, config.cpus) == ("k", 2, 1)
    assert other != config
    assert other.replace(cpus=1) == config
    assert repr(config) == f"MachineConfig(kernel='k', memory={1 << 30})"


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text(
        'kernel = "boot/vmlinuz"\nmemory = 256\nmemory-backing = "memfd"\n'
        'disk = ["a.img,ro", "/b"]\nrng = false\ntimeout = 2.5\nconsole = "pty"\naccel = "kvm"\n'
    )
    loaded = load_toml(str(file))
    assert loaded.pop("accel") == "kvm"
    config = MachineConfig(**loaded)
    assert config.kernel == f"{tmp_path}/boot/vmlinuz"
    assert config.memory == 256 * MIB
    assert config.memory_backing == "memfd"
    assert config.disks == [DiskSpec(f"{tmp_path}/a.img", read_only=True), DiskSpec("/b")]
    assert (config.rng, config.timeout, config.console) == (False, 2.5, "pty")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("memroy = 1", "Did you mean memory?"),
        ("config = 'x'", "not a setting"),
        ("rng = 'no'", "must be true or false"),
        ("memory = [1]", "must be text"),
        ("memory = true", "must be text"),
        ("memory = 'x'", "not a size"),
        ("disk = 'a'\ndisks = 'b'", "set twice"),
        ("a b", "not valid TOML"),
        ("[memory]", "must be text"),
    ],
)
def test_bad_toml_is_a_config_error(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "vm.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_toml(str(file))
    assert sentence in str(caught.value)


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be read"):
        load_toml(str(tmp_path / "none.toml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(str(tmp_path / "binary"))


def test_every_key_is_understood_in_toml(tmp_path: Path) -> None:
    samples = {"memory": "1G", "cpus": 2, "timeout": 3, "console_limit": 1, "cpu": "host"}
    samples |= {"devices": "vmm.devices.port80:Port80", "io_cpus": "0-1", "io_poll": 9}
    for row in SETTINGS:
        if row.dest in ("config", "help") or "run" not in row.commands:
            continue
        value = samples.get(row.dest, row.choices[-1] if row.choices else "x")
        text = "true" if row.kind == SWITCH else repr(value)
        file = tmp_path / "one.toml"
        file.write_text(f"{row.name[2:]} = {text}")
        loaded = load_toml(str(file))
        assert list(loaded) == [row.dest]
        if row.machine:
            MachineConfig(**loaded)
        else:
            assert row.kind in (SWITCH, OPTIONAL, "value")

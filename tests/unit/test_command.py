"""Commands in a guest, without a guest: kernels, what is built, plans, flags, a hostile guest."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.kernels import VERSION, bzimage
from tests.unit.test_nested_parts import cache as cache  # a fixture
from tests.unit.test_nested_parts import kernel_at, module, parse_newc
from vmm.cli import command as cli
from vmm.cli import run
from vmm.cli.accel import run_nested, writable_directories
from vmm.cli.parse import parse
from vmm.config import MachineConfig
from vmm.devices.virtio.port import Port
from vmm.errors import (
    CommandFailed,
    ConfigError,
    GuestLost,
    GuestPanic,
    GuestTimeout,
    HostError,
    VmmError,
)
from vmm.guest.agent import Agent
from vmm.guest.boot import GuestBoot
from vmm.guest.command import Command
from vmm.guest.kernels import guest_kernel
from vmm.guest.log import init_said
from vmm.guest.plan import decode
from vmm.guest.terminal import NoTerminal
from vmm.machine import Machine
from vmm.result import RunResult

RELEASE = VERSION.decode().partition(" ")[0]


# ---- kernels


def test_a_fetched_kernel_will_do(cache: Path) -> None:
    kernel_at(cache / "linux-image-7.1.0-cloud", "7.1.0-cloud", "virtiofs")
    kernel_at(cache / "linux-image-7.2.0-none", "7.2.0-none")
    for name in (None, "host"):
        assert guest_kernel(name, ["virtiofs"]).version == "7.1.0-cloud"
    with pytest.raises(HostError, match=r"No kernel for the guest .* has no 9p"):
        guest_kernel("host", ["9p"])


def build_tree(top: Path) -> None:
    (top / "arch/x86/boot").mkdir(parents=True)
    (top / "arch/x86/boot/bzImage").write_bytes(bzimage())
    (top / "include/config").mkdir(parents=True)
    (top / "include/config/kernel.release").write_text("9.9.0-mine+\n")
    module(top / "fs/fuse/virtiofs.ko", "fuse")
    module(top / "fs/fuse/fuse.ko")
    (top / "modules.builtin").write_text("kernel/drivers/char/virtio_console.ko\n")


@pytest.mark.parametrize("names", ["kernel/fs/fuse/{}.ko", "fs/fuse/{}.o"])
def test_where_a_kernel_was_built(tmp_path: Path, names: str) -> None:
    build_tree(tmp_path)
    (tmp_path / "modules.order").write_text(names.format("virtiofs") + "\n" + names.format("fuse"))
    for path in (tmp_path, tmp_path / "arch/x86/boot/bzImage"):
        tree = guest_kernel(str(path), [])
        assert tree.version == "9.9.0-mine+"
        assert tree.image == str(tmp_path / "arch/x86/boot/bzImage")
        paths = tree.modules.resolve(["virtio-console", "virtiofs"])
        assert [os.path.relpath(p, tmp_path) for p in paths] == [
            "fs/fuse/fuse.ko", "fs/fuse/virtiofs.ko",
        ]  # fmt: skip


def test_an_image_alone(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(bzimage())
    tree = guest_kernel(str(tmp_path / "kernel"), ["virtiofs"])
    assert (tree.version, tree.modules_dir) == (RELEASE, "")
    assert not tree.modules.has("virtiofs")


def test_a_directory_that_is_no_kernels(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"no arch/x86/boot/bzImage .* no boot/vmlinuz"):
        guest_kernel(str(tmp_path), [])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_package_is_unpacked_once(cache: Path, tmp_path: Path) -> None:
    top = tmp_path / "package"
    kernel_at(top, "6.0.0-deb", "virtiofs")
    (top / "DEBIAN").mkdir()
    (top / "DEBIAN/control").write_text(
        "Package: linux-image\nVersion: 1\nArchitecture: amd64\n"
        "Maintainer: x <x@x>\nDescription: x\n"
    )
    deb = tmp_path / "linux-image.deb"
    subprocess.run(["dpkg-deb", "-b", top, deb], check=True, capture_output=True)
    tree = guest_kernel(str(deb), [])
    assert tree.version == "6.0.0-deb"
    assert tree.modules.has("virtiofs")
    os.utime(tree.image, (1, 1))
    assert os.stat(guest_kernel(str(deb), []).image).st_mtime == 1
    with pytest.raises(HostError, match="cannot be read"):
        guest_kernel(str(tmp_path / "none.deb"), [])


# ---- what is built


def boot(tmp_path: Path, **options: Any) -> GuestBoot:
    kernel_at(tmp_path / "k", "7.0.0", "virtio_pci", "virtio_console", "virtio_blk", "overlay")
    (tmp_path / "initrd").write_bytes(b"070701")
    settings = {"kernel": tmp_path / "k", "root": "initrd", "initrds": tmp_path / "initrd"}
    return GuestBoot(MachineConfig(**{**settings, **options}), tty=False)


def archive_of(made: GuestBoot) -> tuple[set[str], list[tuple[str, ...]]]:
    """The names in the initramfs, and the plan."""
    data = Path(made.config.initrds[-1]).read_bytes()
    end = data.index(b"TRAILER!!!\0") + 11
    end += -end % 4
    end += -end % 512
    return set(parse_newc(data)), decode(parse_newc(data[end:])["plan"][1])


def test_what_a_guest_is_made_of(cache: Path, tmp_path: Path) -> None:
    made = boot(tmp_path, append="mine", hostname="box")
    config = made.config
    assert config.kernel == str(tmp_path / "k/boot/vmlinuz-7.0.0")
    assert config.initrds[0] == str(tmp_path / "initrd")
    assert config.append == ["loglevel=5", "mine"]
    labels = [device.label for device in config.devices if isinstance(device, Port)]
    assert labels == ["org.vmm.ctl", "org.vmm.in", "org.vmm.out", "org.vmm.err"]
    names, plan = archive_of(made)
    assert {"init", "dev/console", "modules/virtio_console.ko", "modules/virtio_pci.ko"} <= names
    assert "modules/overlay.ko" not in names
    verbs = [record[0] for record in plan]
    assert (verbs[0], verbs[-1]) == ("end", "await")
    assert ("ports", "org.vmm.", "in", "out", "err") in plan
    assert ("hostname", "box") in plan
    assert any("CONFIG_VIRTIO_CONSOLE" in record[-1] for record in plan if record[0] == "require")
    made.close()
    made.close()


def test_drivers_of_the_machines_devices(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    made = boot(tmp_path, disks=tmp_path / "disk", serial=tmp_path / "log")
    names, plan = archive_of(made)
    made.close()
    assert "modules/virtio_blk.ko" in names
    assert ("module", "/modules/virtio_blk.ko", "") in plan
    assert made.config.append == []  # the log is kept: all of it


def test_a_kernel_without_modules_is_tried(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(bzimage())
    made = boot(tmp_path, kernel=tmp_path / "kernel", transport="mmio")
    names, plan = archive_of(made)
    made.close()
    assert not any(name.startswith("modules") for name in names)
    assert any("virtio_mmio driver (CONFIG_VIRTIO_MMIO)" in record[-1] for record in plan)


# ---- one command


def plan_of(command: Command, sent: int = 0) -> list[tuple[str, ...]]:
    return command.plan(NoTerminal(), ["null", "port", "port"], sent).records


def test_the_plan_of_a_command() -> None:
    records = plan_of(Command(["a", "b c", ""], env={"K": "v"}, place="/here"), 7)
    assert ("argv", "a", "b c", "") in records
    assert ("cwd", "/here", "optional") in records
    assert ("user", "root") in records
    assert ("input", "7") in records
    env = next(record for record in records if record[0] == "env")
    assert [word.partition("=")[0] for word in env[1:]] == ["PATH", "K"]
    assert records[-1] == ("run",)
    strict = plan_of(Command(["a"], cwd="/x", user="bob", env={"PATH": "/p"}))
    assert ("cwd", "/x") in strict
    assert ("user", "bob") in strict
    assert ("env", "PATH=/p") in strict


@pytest.mark.parametrize("argv", [[], [""], ["a", "b\0"]])
def test_commands_that_cannot_be(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no command|NUL byte"):
        plan_of(Command(argv))


def test_a_machine_without_a_root_takes_none() -> None:
    with pytest.raises(VmmError, match="started with a root"):
        Machine(kernel="k").run(["true"])


def test_check_of_a_command() -> None:
    assert RunResult(0, "exited").check().ok
    failed = RunResult(3, "exited", message="It ended with 3.", stderr=b"x\nwhy\n")
    with pytest.raises(CommandFailed, match=r"It ended with 3\. It said: why") as caught:
        failed.check()
    assert (caught.value.status, caught.value.result) == (3, failed)
    assert RunResult(3, "debug-exit").check().status == 3


# ---- flags


def settings(*argv: str) -> dict[str, Any]:
    parsed = parse(list(argv), "run", takes_rest="--")
    return run.settings(parsed.values, command=bool(parsed.rest))


def test_what_follows_the_dashes_is_kept() -> None:
    parsed = parse(["-k", "x", "--", "a", "--", "-k", ""], "run", takes_rest="--")
    assert parsed.rest == ["a", "--", "-k", ""]
    assert parse(["-k", "x", "--"], "run", takes_rest="--").rest == []
    with pytest.raises(
        ConfigError, match=r"flags only, not 'ls'.* A command for the guest follows"
    ):
        parse(["ls", "-l"], "run", takes_rest="--")


def test_defaults_of_a_command() -> None:
    assert settings("--", "true")["root"] == "/"
    assert settings("--root", "d", "--", "true")["root"] == "d"
    assert settings("--", "true")["serial"] == "buffer"
    assert settings("-k", "x")["serial"] == "stdio"
    logged = settings("--console", "log", "--", "true")
    assert (logged["serial"], logged["console"]) == ("log", "none")
    for flag in ("--serial=stdio", "--console=stdio"):
        with pytest.raises(ConfigError, match="standard streams are the command's"):
            settings(flag, "--", "true")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "k", "rw": True}, "--rw is for a command"),
        ({"kernel": "k", "rodirs": ["/x"]}, "--rodir is for a command"),
        ({"root": "initrd"}, "the files of --initrd"),
        ({"root": "initrd", "initrds": ["x"], "rw": True}, "in memory"),
        ({"root": "/", "boot": "flat"}, "needs a Linux"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MachineConfig(**options).validate()


def test_a_root_needs_no_kernel_named() -> None:
    MachineConfig(root="/").validate()


@pytest.mark.parametrize("flag", ["--pwd=/", "--user=x", "--env=A=1"])
def test_flags_of_a_command_need_one(flag: str) -> None:
    with pytest.raises(ConfigError, match="is for a command in the guest"):
        run.main(["-k", "x", flag])


def test_words_are_no_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = MachineConfig(kernel="host", root="initrd", initrds=["x"])
    argv = config.to_argv()
    assert "--kernel=host" in argv
    assert "--root=initrd" in argv
    assert f"--root={tmp_path}/d" in MachineConfig(root="d").to_argv()


def test_the_command_reaches_the_appliance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def nested(argv: list[str], options: object) -> int:
        seen.append(argv)
        return 5

    monkeypatch.setattr("vmm.nested.usable_hint", lambda: None, raising=False)
    monkeypatch.setattr("vmm.nested.run", nested)
    monkeypatch.setenv("MINE", "x y")
    given = settings("-e", "MINE", "-e", "A=1", "--pwd", "/p", "--user", "bob", "--", "x")
    config = MachineConfig(root="/", rwdirs=[f"{tmp_path}:/there"])
    words = ["sh", "-c", "a  b", "", "--"]
    assert run_nested(config, cli.flags(given), "", verbose=False, command=words) == 5
    at = seen[0].index("--")
    assert seen[0][at + 1 :] == words
    assert {"--env=MINE=x y", "--env=A=1", "--pwd=/p", "--user=bob"} <= set(seen[0][:at])
    assert "--root=/" in seen[0][:at]
    assert writable_directories(config) == [str(tmp_path)]


# ---- the agent


class FakePort:
    """Gives the far end to the test."""

    def __init__(self) -> None:
        self.ours, self.far = socket.socketpair()

    def connect(self) -> socket.socket:
        return self.ours


class FakeMachine:
    """Runs until it is stopped, or the test says how it ends."""

    def __init__(self) -> None:
        self.ports = {name: FakePort() for name in ("ctl", "in", "out", "err")}
        self.ended = threading.Event()
        self.end: RunResult | BaseException = RunResult(0, "stopped")

    def wait(self) -> RunResult:
        self.ended.wait()
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end

    def stop(self) -> None:
        self.ended.set()

    def says(self, after: bytes, lines: bytes) -> threading.Thread:
        """``lines`` on the control port once something that ends with ``after`` came by it."""
        far = self.ports["ctl"].far

        def play() -> None:
            got = b""
            while not got.endswith(after):
                got += far.recv(65536)
            far.send(lines)

        thread = threading.Thread(target=play)
        thread.start()
        return thread


RUN = b"run\x000\0"


@pytest.fixture
def fake() -> Iterator[FakeMachine]:
    made = FakeMachine()
    yield made
    for port in made.ports.values():
        port.far.close()


@pytest.fixture
def agent(fake: FakeMachine) -> Iterator[Agent]:
    made = Agent(fake, fake.ports)  # type: ignore[arg-type]
    fake.ports["ctl"].far.send(b"ready\n")
    yield made
    fake.stop()
    made.close()
    made.close()


def test_a_late_command_is_killed_and_the_next_one_runs(fake: FakeMachine, agent: Agent) -> None:
    first = fake.says(RUN, b"started\n")
    killed = threading.Thread(
        target=lambda: (first.join(), fake.says(b"signal 9\n", b"exit 137 0 0 0\nready\n").join())
    )
    killed.start()
    result = agent.call(Command(["a"]), None, 0.5)
    killed.join()
    assert (result.status, result.reason) == (124, "timeout")
    assert "not ended after 0.5 s" in result.message
    second = fake.says(RUN, b"started\nexit 3 0 0 0\nready\n")
    result = agent.call(Command(["a"]), None, None)
    second.join()
    assert (result.status, result.reason) == (3, "exited")


def test_a_command_that_cannot_start_is_not_the_guests_end(fake: FakeMachine, agent: Agent) -> None:
    player = fake.says(RUN, b"fail cannot enter the directory /x\nready\n")
    with pytest.raises(HostError, match="cannot enter the directory /x"):
        agent.call(Command(["a"]), None, None)
    player.join()
    player = fake.says(RUN, b"started\nexit 0 0 0 0\n")
    assert agent.call(Command(["a"]), None, None).ok
    player.join()


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        (RunResult(255, "panic", message="It panicked."), 255, "panic"),
        (RunResult(124, "timeout"), 124, "timeout"),
        (RunResult(0, "poweroff"), 255, "lost"),
        (RunResult(0, "stopped"), 255, "lost"),
    ],
)
def test_a_guest_that_ends_first(
    fake: FakeMachine, agent: Agent, end: RunResult, status: int, reason: str
) -> None:
    fake.end = end
    fake.ports["out"].far.send(b"last words")
    threading.Timer(0.2, fake.stop).start()
    result = agent.call(Command(["a"]), None, None)
    assert (result.status, result.reason) == (status, reason)
    with pytest.raises((GuestPanic, GuestLost, GuestTimeout)):
        result.check()


def test_an_init_that_gave_up(fake: FakeMachine, agent: Agent) -> None:
    fake.end = RunResult(0, "reset", console="vmm-init: the kernel has no overlay file system\n")
    fake.stop()
    with pytest.raises(HostError, match="could not run the command: the kernel has no overlay"):
        agent.call(Command(["a"]), None, None)


def test_output_has_a_limit(fake: FakeMachine, agent: Agent) -> None:
    fake.ports["out"].far.send(b"12345")
    player = fake.says(b"close out\n", b"exit 141 5 0 0\nready\n")
    with pytest.raises(HostError, match="Cannot write the command's stdout: File too large"):
        agent.call(Command(["a"]), None, None, 4)
    player.join()
    fake.ports["out"].far.send(b"1234")
    player = fake.says(RUN, b"started\nexit 0 4 0 0\n")
    assert agent.call(Command(["a"]), None, None, 4).stdout == b"1234"
    player.join()


def test_what_a_handler_raised_reaches_the_caller(fake: FakeMachine, agent: Agent) -> None:
    fake.end = ZeroDivisionError("in a device")
    fake.stop()
    with pytest.raises(ZeroDivisionError):
        agent.call(Command(["a"]), None, None)


def test_what_init_said_last() -> None:
    log = (
        "a\n[    1.0] vmm-init: old\nvmm-init: the kernel has no X\n[    2.0] reboot: Power down\n"
    )
    assert init_said(log) == "the kernel has no X"
    assert init_said("no such thing") == ""

"""The parts of the emulated host that need no machine: cpio, plan, modules, kernels, streams."""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import shutil
import socket
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from vmm.errors import ConfigError, HostError
from vmm.guest.cache import private_dir
from vmm.guest.cpio import S_IFCHR, CpioWriter
from vmm.guest.initbin import init_path
from vmm.guest.kernels import fetch_debian_kernel, find_kernel, version_key
from vmm.guest.modules import ModuleTree, dependencies, module_name, read_module
from vmm.guest.plan import VERBS, Plan, decode
from vmm.guest.streams import Input, Output
from vmm.nested import Options, appliance, snapshot
from vmm.nested.machine import find_parts
from vmm.nested.qemu import Qemu, Share

ROOT = Path(__file__).resolve().parent.parent.parent


# ---- cpio


def parse_newc(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """name -> (mode, contents, device); stops at the trailer. kernel buffer-format.rst"""
    entries, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_at = at + 110
        body_at = (name_at + fields[11] + 3) & ~3
        name = data[name_at : name_at + fields[11] - 1].decode()
        at = (body_at + fields[6] + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        assert name not in entries
        entries[name] = (fields[1], data[body_at : body_at + fields[6]], (fields[9], fields[10]))


def written() -> bytes:
    out = io.BytesIO()
    writer = CpioWriter(out)
    writer.add_file("a/b/odd", b"12345", 0o755)
    writer.add_file("/a/empty", b"")
    writer.add_dir("a/b")
    writer.add_symlink("link", "a/b/odd")
    writer.add_node("dev/console", S_IFCHR | 0o600, 5, 1)
    writer.close()
    return out.getvalue()


def test_cpio_entries_and_their_parents_in_order() -> None:
    entries = parse_newc(written())
    assert list(entries) == ["a", "a/b", "a/b/odd", "a/empty", "link", "dev", "dev/console"]
    assert entries["a"] == (stat.S_IFDIR | 0o755, b"", (0, 0))
    assert entries["a/b/odd"] == (stat.S_IFREG | 0o755, b"12345", (0, 0))
    assert entries["link"] == (stat.S_IFLNK | 0o777, b"a/b/odd", (0, 0))
    assert entries["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert written() == written()
    assert len(written()) % 512 == 0


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio here to compare with")
def test_cpio_reads_it() -> None:
    listed = subprocess.run(["cpio", "-it", "--quiet"], input=written(), capture_output=True)
    assert listed.stdout.decode().split() == list(parse_newc(written()))


# ---- plan


def test_plan_round_trip() -> None:
    plan = Plan()
    plan.add("argv", "sh", "-c", "", "a\nb", b"\xff".decode("utf-8", "surrogateescape"))
    plan.add("env")
    plan.mount("tmpfs", "/x", flags="ro,nosuid", data="mode=755")
    plan.add("ids", 0, 100, 7)
    assert decode(plan.encode()) == plan.records
    assert plan.records[2] == ("mount", "tmpfs", "none", "/x", "ro,nosuid", "mode=755")
    assert plan.records[3] == ("ids", "0", "100", "7")


@pytest.mark.parametrize("record", [("no-such-verb",), ("mount", "tmpfs"), ("argv", "a\0b")])
def test_plan_refuses_what_init_would(record: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="plan"):
        Plan().add(*record)


def test_plan_cut_short() -> None:
    plan = Plan()
    plan.add("argv", "one", "two")
    for size in range(1, len(plan.encode())):
        with pytest.raises(ValueError, match="cut short"):
            decode(plan.encode()[:size])


def test_verbs_are_those_of_init() -> None:
    source = (ROOT / "guests/init/init.c").read_text()
    table = source[source.index("} verbs[] = {") :].partition("};")[0]
    found = {}
    for entry in table.split("{ ")[1:]:
        name, count, *_ = entry.split(", ")
        found[name.strip('"')] = int(count)
    assert found == VERBS


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="/init is for x86-64")
def test_init_says_what_is_wrong_with_a_plan(tmp_path: Path) -> None:
    """It is a program like any other when it is not process 1."""
    done = subprocess.run([init_path()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)


# ---- modules


def elf(modinfo: bytes) -> bytes:
    """A 64-bit ELF file of two sections, the way modules have them."""
    names = b"\0.modinfo\0.shstrtab\0"
    body = 64 + len(modinfo) + len(names)
    section = struct.Struct("<IIQQQQIIQQ")
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, body, 0, 64, 0, 0, 64, 3, 2
    )
    table = section.pack(*[0] * 10)
    table += section.pack(1, 1, 2, 0, 64, len(modinfo), 0, 0, 1, 0)
    table += section.pack(10, 3, 0, 0, 64 + len(modinfo), len(names), 0, 0, 1, 0)
    return header + modinfo + names + table


def module(path: Path, depends: str = "", soft: str = "") -> None:
    info = b"license=GPL\0depends=" + depends.encode() + b"\0"
    if soft:
        info += b"softdep=" + soft.encode() + b"\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = elf(info + b"name=x\0")
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "lib/modules/6.1.0-9-test"
    module(root / "kernel/fs/9p/9p.ko", "9pnet,netfs")
    module(root / "kernel/net/9pnet.ko")
    module(root / "kernel/fs/netfs.ko.xz", "", "pre: crc32c missing post: late")
    module(root / "kernel/lib/crc32c_generic.ko")
    module(root / "kernel/arch/kvm-amd.ko", "kvm")
    module(root / "kernel/arch/kvm.ko", "irqbypass")
    module(root / "kernel/lib/late.ko")
    (root / "modules.builtin").write_text("kernel/virt/lib/irqbypass.ko\n")
    return root


def names(paths: list[str]) -> list[str]:
    return [module_name(path) for path in paths]


def test_modules_in_the_order_they_load(tree: Path) -> None:
    resolved = ModuleTree(str(tree)).resolve(["9p", "kvm-amd", "netfs"])
    assert names(resolved) == ["9pnet", "crc32c_generic", "netfs", "9p", "kvm", "kvm_amd"]
    assert all(os.path.isfile(path) for path in resolved)


@pytest.mark.parametrize("index", ["modules.dep", "modules.order"])
def test_modules_listed_by_an_index(tree: Path, index: str) -> None:
    """depmod's index, or the build's, which says .ko also where the file became .ko.xz."""
    paths = [str(p.relative_to(tree)) for p in tree.rglob("*.ko*")]
    if index == "modules.dep":
        text = "".join(f"{path}: kernel/whatever.ko\n" for path in paths)
    else:
        text = "".join(path.removesuffix(".xz") + "\n" for path in paths)
    (tree / index).write_text(text)
    resolved = ModuleTree(str(tree)).resolve(["9p"])
    assert names(resolved) == ["9pnet", "crc32c_generic", "netfs", "9p"]


def test_modules_built_in_or_missing(tree: Path) -> None:
    modules = ModuleTree(str(tree))
    assert modules.resolve(["irqbypass"]) == []
    assert (modules.has("kvm_amd"), modules.has("irqbypass"), modules.has("xfs")) == (
        True,
        True,
        False,
    )
    with pytest.raises(HostError, match="have no xfs"):
        modules.resolve(["xfs"])


def test_modules_that_need_each_other_end(tree: Path) -> None:
    module(tree / "kernel/a.ko", "b")
    module(tree / "kernel/b.ko", "a")
    assert sorted(names(ModuleTree(str(tree)).resolve(["a"]))) == ["a", "b"]


def test_signature_is_left_out(tmp_path: Path) -> None:
    image = elf(b"depends=\0")
    signature = bytes(100) + struct.pack(">8xI", 100) + b"~Module signature appended~\n"
    (tmp_path / "x.ko").write_bytes(image + signature)
    assert read_module(str(tmp_path / "x.ko")) == image


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", elf(b"depends=a\0")[:90], b"x" * 500])
def test_damaged_modules_have_no_dependencies(damage: bytes) -> None:
    assert dependencies(damage) == ([], [])


def test_a_damaged_compressed_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.ko.xz").write_bytes(b"not xz")
    with pytest.raises(HostError, match=r"x\.ko\.xz cannot be unpacked"):
        read_module(str(tmp_path / "x.ko.xz"))


# ---- kernels


def kernel_at(top: Path, version: str, *modules: str) -> None:
    (top / "boot").mkdir(parents=True, exist_ok=True)
    (top / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")
    (top / "lib/modules" / version).mkdir(parents=True)
    for name in modules:
        module(top / "lib/modules" / version / f"kernel/{name}.ko")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VMM_NESTED_KERNEL", raising=False)
    return tmp_path / "cache/vmm/kernel-packages"


def test_the_newest_kernel_that_does(cache: Path) -> None:
    kernel_at(cache / "linux-image-6.1.0-9-amd64", "6.1.0-9-amd64", "9p", "kvm-amd")
    kernel_at(cache / "linux-image-6.1.0-10-amd64", "6.1.0-10-amd64", "9p", "kvm-amd")
    kernel_at(cache / "linux-image-6.2.0-1-cloud", "6.2.0-1-cloud", "kvm-amd")
    assert find_kernel(["9p", "kvm-amd"]).version == "6.1.0-10-amd64"
    assert find_kernel(["kvm-amd"]).version == "6.2.0-1-cloud"


def test_a_kernel_by_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_at(tmp_path / "mine", "5.0-mine", "9p")
    for name in (tmp_path / "mine", tmp_path / "mine/boot/vmlinuz-5.0-mine"):
        assert find_kernel(["9p"], str(name)).version == "5.0-mine"
        monkeypatch.setenv("VMM_NESTED_KERNEL", str(name))
        assert find_kernel(["9p"]).version == "5.0-mine"


def test_what_is_missing_is_said(cache: Path, tmp_path: Path) -> None:
    kernel_at(tmp_path / "mine", "5.0-mine", "9p")
    with pytest.raises(HostError, match=r"5\.0-mine has no kvm-amd\): install linux-image-amd64"):
        find_kernel(["9p", "kvm-amd"], str(tmp_path / "mine"))
    with pytest.raises(HostError, match="no kernel with its modules at /no/where"):
        find_kernel(["9p"], "/no/where")


def test_a_fetched_kernel_is_not_fetched_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/no/apt/here")
    kernel_at(cache / "linux-image-6.1.0-9-amd64", "6.1.0-9-amd64")
    kernel_at(cache / "linux-image-6.1.0-10-amd64", "6.1.0-10-amd64")
    kernel_at(cache / "linux-image-6.1.0-11-cloud-amd64", "6.1.0-11-cloud-amd64")
    assert fetch_debian_kernel("amd64").version == "6.1.0-10-amd64"
    assert fetch_debian_kernel("cloud-amd64").version == "6.1.0-11-cloud-amd64"
    with pytest.raises(HostError, match="needs apt-cache"):
        fetch_debian_kernel("rt-amd64")


def test_versions_as_people_sort_them() -> None:
    versions = ["6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-10-cloud-amd64", "6.10.0", "6.2"]
    assert sorted(versions, key=version_key) == [
        "6.1.0-9-amd64",
        "6.1.0-10-amd64",
        "6.1.0-10-cloud-amd64",
        "6.2",
        "6.10.0",
    ]


# ---- snapshots


def test_snapshots_are_drafted_published_and_found(cache: Path) -> None:
    draft = snapshot.draft(1 << 20)
    assert draft is not None
    assert os.path.getsize(draft.ram) == 1 << 20
    assert snapshot.find("key") is None
    os.write(draft.fds[snapshot.STATE], b"devices")
    found = draft.publish("key")
    draft.discard()
    assert found is not None
    assert os.pread(found.fds[snapshot.STATE], 100, 0) == b"devices"
    assert os.fstat(found.fds[snapshot.RAM]).st_size == 1 << 20
    assert os.listdir(os.path.dirname(found.path)) == ["key"]
    found.discard()
    assert snapshot.find("key") is None
    assert found.fds == []


def test_the_newest_snapshots_are_kept(cache: Path) -> None:
    top = private_dir("nested", "snapshots")
    for number in range(6):
        draft = snapshot.draft(4096)
        assert draft is not None
        found = draft.publish(f"key{number}")
        draft.discard()
        assert found is not None
        while found.fds:
            os.close(found.fds.pop())
        os.utime(found.path, (number, number))
    assert sorted(os.listdir(str(top))) == ["key2", "key3", "key4", "key5"]


def test_a_draft_of_the_dead_goes_and_one_of_the_living_stays(cache: Path) -> None:
    mine, other = snapshot.draft(4096), snapshot.draft(4096)
    assert mine is not None
    assert other is not None
    dead = Path(mine.path).with_name(".draft-99999999-1")
    dead.mkdir()
    published = mine.publish("key")
    assert published is not None
    assert not dead.exists()
    assert os.path.exists(other.path)
    for each in (mine, other, published):
        each.discard()


def test_a_directory_others_can_write_to_is_not_used(cache: Path) -> None:
    top = private_dir("nested", "snapshots")
    assert top is not None
    os.chmod(top, 0o775)
    assert private_dir("nested", "snapshots") is None
    assert snapshot.draft(4096) is None


# ---- streams


@pytest.fixture
def pair() -> object:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def test_output_waits_for_no_reader(pair: tuple[socket.socket, socket.socket]) -> None:
    port, guest = pair
    read, write = os.pipe()
    output = Output("out", write)
    data = os.urandom(300_000)
    got, sent = b"", 0
    guest.setblocking(False)
    while len(got) < len(data):
        if sent < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += guest.send(data[sent : sent + 65536])
        for _ in range(5):
            output.step(port)  # a full pipe must not stop it
        got += os.read(read, 50_000)
    assert got == data
    assert output.taken == len(data)
    output.close()
    os.close(read)
    os.close(write)


def test_output_without_a_reader_is_broken_and_drains(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    port, guest = pair
    read, write = os.pipe()
    output = Output("out", write)
    os.close(read)
    for _ in range(3):
        guest.send(b"x" * 1000)
        output.step(port)
    assert (output.broken, output.error, output.taken) == (True, None, 3000)
    output.close()
    os.close(write)


def test_output_to_a_full_disk_keeps_the_reason(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    port, guest = pair
    full = os.open("/dev/full", os.O_WRONLY)
    output = Output("out", full)
    guest.send(b"x")
    output.step(port)
    assert output.broken
    assert output.error is not None
    assert output.error.strerror == "No space left on device"
    os.close(full)


def test_input_counts_to_its_end(pair: tuple[socket.socket, socket.socket]) -> None:
    port, guest = pair
    read, write = os.pipe()
    stdin = Input(read)
    os.write(write, b"abc")
    os.close(write)
    assert stdin.wants(port) == (read, 1)
    assert stdin.read() == b"abc"
    stdin.send(port)
    assert guest.recv(10) == b"abc"
    assert stdin.read() == b""
    assert (stdin.ended, stdin.total, stdin.wants(port)) == (True, 3, None)
    os.close(read)


def test_a_directory_as_stdin_has_nothing_to_read(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    stdin = Input(fd)
    assert (stdin.read(), stdin.ended) == (b"", True)
    os.close(fd)


# ---- QEMU's command line, and options


def test_commas_in_names_reach_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm.nested.qemu.find_qemu", lambda: "qemu")
    qemu = Qemu("/k", memory=1 << 30, cpus=2, append="quiet")
    qemu.add_share(Share("rw0", "/a,b", readonly=False))
    assert any("path=/a,,b,security_model=none,readonly=off" in arg for arg in qemu.args)
    assert qemu.args[qemu.args.index("-m") + 1] == "1024M"
    qemu.close()
    qemu.close()


def test_without_qemu_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/no/where")
    with pytest.raises(HostError, match=r"install qemu-system-x86 \(Debian\)"):
        find_parts(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(rw=["/no/where"]), "no such directory"),
        (Options(rw=["/"]), "not the whole machine"),
        (Options(env=["=x"]), "give KEY or KEY=VALUE"),
        (Options(memory=1), "at least 256 MiB"),
        (Options(cpus=0), "0 CPUs"),
    ],
)
def test_options_that_cannot_be(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        appliance.run_command(["true"], options)


def test_no_command() -> None:
    with pytest.raises(ConfigError, match="no command"):
        appliance.run_command([], Options())

"""Puts a nested machine together: the plan for its /init, QEMU's command line, and the run."""

from __future__ import annotations

import os
import resource
import stat

from vmm.errors import ConfigError, HostError
from vmm.nested.image import unpacked_kernel
from vmm.nested.initramfs import Initramfs
from vmm.nested.kernels import KernelTree, cache_dir, find_kernel
from vmm.nested.plan import Plan
from vmm.nested.pump import Pump, Signals, print_tail
from vmm.nested.qemu import KERNEL_ARGS, Qemu, Share, find_qemu
from vmm.nested.streams import Input, Output
from vmm.nested.terminal import Terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.nested import Options

#: Set inside a nested machine, so that nobody nests again by mistake.
MARK = "VMM_NESTED"

_PORTS = "org.vmm."
_PORT_MODULES = ["virtio_pci", "virtio_console"]
_SHARE_MODULES = ["9pnet_virtio", "9p", "overlay"]
_KVM_MODULES = ["kvm-amd"]
#: Modules without which there is no nested machine.
NEEDED = [*_PORT_MODULES, *_SHARE_MODULES, *_KVM_MODULES]
# For the devices of machines inside; each is left out where the kernel has none.
_OPTIONAL = ["tun", "vhost_net", "vhost_vsock"]
_OPENED = ("kvm", "net/tun", "vhost-net", "vhost-vsock")

_MIB = 1 << 20
_MAX_MEMORY = 4096 * _MIB
_MIN_MEMORY = 256 * _MIB
_MSIZE = 512000  # the most the kernel's 9p over virtio takes in one request


def find_parts(kernel: str | None) -> KernelTree:
    """Check that all a nested machine needs is here. HostError names what is missing."""
    if os.uname().machine != "x86_64":
        raise HostError(f"The nested machine needs an x86-64 host, this is {os.uname().machine}")
    find_qemu()
    return find_kernel(NEEDED, kernel)


def run_command(argv: list[str], options: Options) -> int:
    """See ``vmm.nested.run``."""
    if not argv:
        raise ConfigError("There is no command to run in the nested machine")
    shares = _shares(options.rw)
    environment = _environment(options.env)
    memory, cpus = _size(options)
    kernel = find_parts(options.kernel)
    _fill_closed_streams()
    modules = [*NEEDED, *(name for name in _OPTIONAL if _has(kernel, name))]
    initramfs = Initramfs(kernel, modules, os.path.join(cache_dir(), "nested"))
    terminal = Terminal()
    stdio = _stdio(terminal)
    plan = _plan(initramfs, modules, shares, terminal, stdio)
    plan.add("argv", *argv)
    plan.add("env", *(f"{key}={value}" for key, value in environment.items()))
    plan.add("run")
    append = KERNEL_ARGS if options.verbose else f"{KERNEL_ARGS} quiet"
    image = unpacked_kernel(kernel.image) or kernel.image
    qemu = Qemu(image, memory=memory, cpus=cpus, append=append)
    stdin = Input(0) if stdio[0] != "null" else None
    outputs = _outputs(terminal, stdio)
    with Signals() as signals:
        try:
            qemu.add_initrd(initramfs.with_plan(plan))
            for name in ("ctl", *(("in",) if stdin else ()), *outputs):
                qemu.add_port(_PORTS, name)
            for share in shares:
                qemu.add_share(share)
            pump = Pump(qemu, signals, terminal, stdin, outputs, options.timeout, options.verbose)
            qemu.start()
            return _pumped(pump, terminal, options.verbose)
        finally:
            qemu.close()
            terminal.restore()
            for output in outputs.values():
                output.close()


def _pumped(pump: Pump, terminal: Terminal, verbose: bool) -> int:
    try:
        return pump.run()
    except HostError:
        terminal.restore()
        if not verbose:
            print_tail(pump.log)
        raise


def _has(kernel: KernelTree, name: str) -> bool:
    from vmm.nested.modules import ModuleTree

    return ModuleTree(kernel.modules_dir).has(name)


def _shares(rw: list[str]) -> list[Share]:
    shares = [Share("root", "/", readonly=True)]
    for index, path in enumerate(sorted({os.path.realpath(path) for path in rw})):
        if not os.path.isdir(path):
            raise ConfigError(f"--rw {path}: there is no such directory")
        if path == "/":
            raise ConfigError("--rw /: name the directories to change, not the whole machine")
        shares.append(Share(f"rw{index}", path, readonly=False))
    return shares


def _environment(settings: list[str]) -> dict[str, str]:
    environment = dict(os.environ)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key:
            raise ConfigError(f"--env {setting}: give KEY or KEY=VALUE")
        if equals:
            environment[key] = value
        elif key not in environment:
            raise ConfigError(f"--env {key}: it is not set in the environment")
    environment[MARK] = "1"
    return environment


def _size(options: Options) -> tuple[int, int]:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = options.memory if options.memory is not None else min(_MAX_MEMORY, host // 2)
    cpus = options.cpus if options.cpus is not None else min(2, len(os.sched_getaffinity(0)))
    if options.memory is not None and memory < _MIN_MEMORY:
        raise ConfigError(f"The nested machine needs at least {_MIN_MEMORY // _MIB} MiB of memory")
    if not 1 <= cpus <= 255:
        raise ConfigError(f"The nested machine cannot have {cpus} CPUs: choose from 1 to 255")
    return memory, cpus


def _fill_closed_streams() -> None:
    """A closed standard stream must not become some descriptor of ours by accident."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open("/dev/null", os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)


def _stdio(terminal: Terminal) -> list[str]:
    """How each stream travels; see the plan's verb ``stdio``."""
    how = ["tty" if terminal.is_tty[fd] else "port" for fd in range(3)]
    if how[0] == "port" and (os.isatty(0) or _is_null(0)):
        how[0] = "null"  # a background job's terminal is not to be read
    if how[1] == how[2] == "port" and _same_file(1, 2):
        how[2] = "stdout"  # 2>&1: keep the order in which the command wrote
    return how


def _is_null(fd: int) -> bool:
    info = os.fstat(fd)
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(1, 3)


def _same_file(one: int, other: int) -> bool:
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def _outputs(terminal: Terminal, stdio: list[str]) -> dict[str, Output]:
    outputs = {}
    if stdio[1] == "port":
        outputs["out"] = Output("out", 1)
    if stdio[2] == "port":
        outputs["err"] = Output("err", 2)
    if "tty" in stdio:
        outputs["tty"] = Output("tty", terminal.fd)
    return outputs


def _plan(
    initramfs: Initramfs,
    modules: list[str],
    shares: list[Share],
    terminal: Terminal,
    stdio: list[str],
) -> Plan:
    plan = Plan()
    plan.add("end", "wait")
    plan.add("stdio", *stdio)
    plan.add("tty", *terminal.size(), "raw" if terminal.raw_output else "cooked")
    plan.mount("devtmpfs", "/dev", flags="nosuid")
    plan.mount("sysfs", "/sys")
    for path in initramfs.load(_PORT_MODULES):
        plan.add("module", path, "")
    plan.add("ports", _PORTS)
    early = set(initramfs.load(_PORT_MODULES))
    for path in initramfs.load(modules):
        if path not in early:
            plan.add("module", path, "")
    plan.mount(
        "9p", "/lower", "root", "ro", f"trans=virtio,version=9p2000.L,msize={_MSIZE},cache=loose"
    )
    plan.mount("tmpfs", "/upper", data="mode=755,size=75%")
    plan.add("mkdir", "/upper/top", "755")
    plan.add("mkdir", "/upper/work", "755")
    plan.mount("overlay", "/new", data="lowerdir=/lower,upperdir=/upper/top,workdir=/upper/work")
    plan.mount("proc", "/new/proc", flags="nosuid,nodev,noexec")
    plan.mount("sysfs", "/new/sys", flags="nosuid,nodev,noexec")
    plan.mount("devtmpfs", "/new/dev", flags="nosuid")
    plan.mount("tmpfs", "/new/run", flags="nosuid,nodev", data="mode=755")
    plan.add("root", "/new")
    plan.mount("devpts", "/dev/pts", flags="nosuid,noexec", data="gid=5,mode=620,ptmxmode=666")
    plan.mount("tmpfs", "/dev/shm", flags="nosuid,nodev", data="mode=1777")
    for target, link in (("fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr")):
        plan.add("symlink", f"/proc/self/{target}", f"/dev/{link}")
    for share in shares[1:]:
        plan.mount(
            "9p",
            share.path,
            share.tag,
            "",
            f"trans=virtio,version=9p2000.L,msize={_MSIZE},cache=mmap",
        )
    plan.add("require", "/dev/kvm", 2000, "/dev/kvm did not appear: kvm-amd found no SVM")
    for name in _OPENED:
        plan.add("chmod", f"/dev/{name}", "666")
    plan.add("hostname", os.uname().nodename)
    plan.add("loopback")
    _identity(plan)
    return plan


def _identity(plan: Plan) -> None:
    """The command runs as who called us, where we were called."""
    mask = os.umask(0)
    os.umask(mask)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    plan.add("ids", os.getuid(), os.getgid(), *os.getgroups())
    plan.add("limits", f"{mask:o}", soft if soft != resource.RLIM_INFINITY else 1 << 20)
    try:
        plan.add("cwd", os.getcwd())
    except OSError as error:
        raise HostError(f"The current directory cannot be named: {error.strerror}") from error

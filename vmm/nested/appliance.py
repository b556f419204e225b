"""One command in a nested machine: what it needs from the caller, and the plan for /init."""

from __future__ import annotations

import os
import resource
import time

from vmm.errors import ConfigError, HostError
from vmm.guest import system
from vmm.guest.log import print_tail
from vmm.guest.plan import Plan
from vmm.guest.pump import Finished, Job, Pump
from vmm.guest.signals import Signals
from vmm.guest.standard import (
    choose_stdio,
    fill_closed_streams,
    open_outputs,
    read_environment,
)
from vmm.guest.streams import Input
from vmm.guest.terminal import Terminal
from vmm.host import NESTED
from vmm.nested.machine import Machine
from vmm.nested.qemu import Qemu, Share

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.nested import Options

# Devices that anybody may use inside, as the machine belongs to whoever started it.
_OPENED = ("kvm", "net/tun", "vhost-net", "vhost-vsock")

_MIB = 1 << 20
_MAX_MEMORY = 4096 * _MIB
_MIN_MEMORY = 256 * _MIB
_GRAIN = 64 * _MIB  # a host's memory varies a little from start to start; snapshots should not
# QEMU loses an interrupt once in some million exits of guests inside; without another the CPU it
# was for may sleep for ever. What a ping causes is another, on each CPU in turn.
_SILENCE_S = 120.0
_MSIZE = 512000  # the most the kernel's 9p over virtio takes in one request


def run_command(argv: list[str], options: Options) -> int:
    """See ``vmm.nested.run``."""
    if not argv:
        raise ConfigError("There is no command to run in the nested machine")
    limit = None if options.timeout is None else time.monotonic() + options.timeout
    shares = _shares(options.rw)
    environment = _environment(options.env)
    machine = Machine(options.kernel, *_size(options), shares, options.verbose)
    fill_closed_streams()
    terminal = Terminal()
    stdio = choose_stdio(terminal)
    plan = _plan(shares, terminal, stdio)
    plan.add("argv", *argv)
    plan.add("env", *(f"{key}={value}" for key, value in environment.items()))
    plan.add("run")
    stdin = Input(0) if stdio[0] != "null" else None
    outputs = open_outputs(terminal, stdio)
    pumps: list[Pump] = []
    with Signals() as signals:

        def pump(qemu: Qemu) -> Pump:
            job = Job(plan, terminal, stdin, outputs, limit, _SILENCE_S)
            made = Pump(qemu, job, signals, verbose=options.verbose)
            pumps.append(made)
            return made

        try:
            return machine.run(pump, keep=not options.verbose)
        except Finished as end:
            return end.status
        except HostError:
            terminal.restore()
            if pumps and not options.verbose:
                print_tail(pumps[-1].log, Qemu.noun)
            raise
        finally:
            terminal.restore()
            for output in outputs.values():
                output.close()


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
    return {**os.environ, **read_environment(settings), NESTED: "1"}


def _size(options: Options) -> tuple[int, int]:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    default = min(_MAX_MEMORY, host // 2) // _GRAIN * _GRAIN
    memory = options.memory if options.memory is not None else default
    cpus = options.cpus if options.cpus is not None else min(2, len(os.sched_getaffinity(0)))
    if options.memory is not None and memory < _MIN_MEMORY:
        raise ConfigError(f"The nested machine needs at least {_MIN_MEMORY // _MIB} MiB of memory")
    if not 1 <= cpus <= 255:
        raise ConfigError(f"The nested machine cannot have {cpus} CPUs: choose from 1 to 255")
    return memory, cpus


def _plan(shares: list[Share], terminal: Terminal, stdio: list[str]) -> Plan:
    """What differs from run to run; carried out when the machine is up."""
    plan = Plan()
    plan.add("stdio", *stdio)
    plan.add("tty", *terminal.size(), "raw" if terminal.raw_output else "cooked")
    # A machine from a snapshot has an old clock, and random numbers that others have had.
    plan.add("clock", *divmod(time.time_ns(), 1_000_000_000))
    plan.add("entropy", os.urandom(64).hex())
    plan.add("kvm")
    options = f"trans=virtio,version=9p2000.L,msize={_MSIZE}"
    plan.mount("9p", "/lower", "root", "ro", f"{options},cache=loose")
    system.overlay(plan, "/lower", "/new", "/upper")
    system.kernel_mounts(plan, "/new")
    plan.add("root", "/new")
    system.devices(plan)
    for share in shares[1:]:
        plan.mount("9p", share.path, share.tag, "", f"{options},cache=mmap")
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

"""Where a guest runs: on this host's KVM, or in an appliance that has a true one."""

from __future__ import annotations

import os

from vmm.arch.base import native_host
from vmm.errors import BootError
from vmm.host import NESTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.config import MachineConfig

DEV_KVM = "/dev/kvm"
MIB = 1 << 20
#: The appliance's own needs beside the guest's RAM.
APPLIANCE_MEMORY = 1024 * MIB
#: What the appliance may take to come up, on top of the guest's own deadline, in seconds.
APPLIANCE_TIME = 300.0


def is_linux(config: MachineConfig) -> bool:
    """Whether the payload is a Linux kernel. What is no kernel at all is not; it is refused
    sooner where nothing is booted first."""
    if config.root is not None:
        return True  # it takes commands
    if config.boot in ("flat", "multiboot") or not config.kernel:
        return False
    from vmm.arch.base import native_kernels
    from vmm.arch.source import Source

    try:
        with Source.open(config.kernel, "kernel") as source:
            return native_kernels().is_linux(source)
    except BootError:
        return False


def choose(accel: str, config: MachineConfig) -> tuple[str, str]:
    """('kvm' or 'nested', why), for --accel. ``why`` is empty when it goes without saying."""
    if accel != "auto" or os.environ.get(NESTED):
        return ("nested" if accel == "nested" else "kvm"), ""
    try:
        os.close(os.open(DEV_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return "nested", f"{DEV_KVM} cannot be used ({e.strerror})"
    host = native_host()
    if host.extension() or not is_linux(config):
        return "kvm", ""
    return "nested", f"this host's KVM has {host.NO_EXTENSION} and cannot run Linux"


def run_nested(
    config: MachineConfig,
    flags: list[str],
    why: str,
    *,
    verbose: bool,
    command: Sequence[str] = (),
) -> int:
    """Run the same machine inside an appliance; gives the exit status.

    ``flags`` are those that are not settings of the machine; ``command`` follows them all.
    Raises HostError when the appliance's parts are missing.
    """
    import sys

    import vmm
    from vmm import nested
    from vmm.errors import HostError

    missing = nested.usable_hint()
    if missing is not None:
        raise HostError(f"{why}; {missing}" if why else missing)
    package = os.path.dirname(os.path.abspath(str(vmm.__file__)))
    _compile(package)
    path = os.pathsep.join(
        [os.path.dirname(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    argv = [sys.executable, "-m", "vmm", "run", "--accel=kvm", *config.to_argv(), *flags]
    argv += ["--", *command] if command else []
    options = nested.Options(
        rw=writable_directories(config),
        memory=_appliance_memory(config),
        timeout=None if config.timeout is None else config.timeout + APPLIANCE_TIME,
        env=[f"PYTHONPATH={path}"],
        verbose=verbose,
    )
    return nested.run(argv, options)


def _compile(package: str) -> None:
    """Have vmm's modules compiled: emulated, compiling them anew costs many seconds a run."""
    if os.access(package, os.W_OK):
        import compileall

        compileall.compile_dir(package, quiet=2)


def writable_directories(config: MachineConfig) -> list[str]:
    """The directories a run writes to: of its console files and its writable disks."""
    from vmm.values import TARGETS

    files = [target for target in (config.serial, config.console) if target not in TARGETS]
    files += [disk.path for disk in config.disks if not disk.read_only]
    real = [os.path.realpath(path) for path in files]
    folders = [text.rpartition(":")[0] or text for text in config.rwdirs]
    folders += [config.root] if config.rw and config.root else []
    # What is no regular file (/dev/null, a block device) is not written by its directory.
    found = {os.path.dirname(p) for p in real if os.path.isfile(p) or not os.path.exists(p)}
    return sorted(found | {os.path.realpath(path) for path in folders})


def _appliance_memory(config: MachineConfig) -> int | None:
    """None: its default is enough."""
    enough = config.memory + APPLIANCE_MEMORY
    return enough if enough > 2048 * MIB else None

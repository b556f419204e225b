"""What CPUID answers in the guest: KVM's supported leaves, made to fit this machine.

Entries are (function, index, flags, eax, ebx, ecx, edx), as KVM_GET_SUPPORTED_CPUID gives and
KVM_SET_CPUID2 takes them. KVM api.rst §4.46, KVM cpuid.rst, Intel SDM vol 2 CPUID,
AMD APM vol 3 appendix E.
"""

from __future__ import annotations

from vmm.arch.x86_64 import cpu_features
from vmm.arch.x86_64.cpu_features import EAX, EBX, ECX, EDX
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmm.arch.x86_64.cpu_features import Edit, Entry

_SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX

# Leaf 1.
_MONITOR, _PDCM, _X2APIC = 1 << 3, 1 << 15, 1 << 21
_TSC_DEADLINE, _XSAVE, _OSXSAVE, _AVX, _HYPERVISOR = 1 << 24, 1 << 26, 1 << 27, 1 << 28, 1 << 31
_MTRR, _HTT = 1 << 12, 1 << 28
# Leaf 6.
_ARAT = 1 << 2
# Leaf 7.
_SGX, _MPX, _AVX512F, _SGX_LC, _PKU, _AMX_TILE = 1 << 2, 1 << 14, 1 << 16, 1 << 30, 1 << 3, 1 << 24
# Leaf 0x80000001.
_CMP_LEGACY, _PERFCTR_CORE, _PERFCTR_NB, _PERFCTR_LLC = 1 << 1, 1 << 23, 1 << 24, 1 << 28
#: Bits of leaf 1 EDX that AMD repeats in leaf 0x80000001 EDX.
_AMD_SHARED = 0x0183F3FF

#: XSAVE components each feature brings. Intel SDM vol 1 §13.1.
_XCR0 = (
    (1, 0, ECX, _AVX, 1 << 2),
    (7, 0, EBX, _MPX, 1 << 3 | 1 << 4),
    (7, 0, EBX, _AVX512F, 1 << 5 | 1 << 6 | 1 << 7),
    (7, 0, ECX, _PKU, 1 << 9),
    (7, 0, EDX, _AMX_TILE, 1 << 17 | 1 << 18),
)
_XSAVE_LEGACY_SIZE = 512 + 64

#: "KVMKVMKVM\0\0\0" and the leaf that tells frequencies. KVM cpuid.rst.
_KVM_SIGNATURE = (0x4B4D564B, 0x564B4D56, 0x0000004D)
_KVM_BASE, _KVM_FREQUENCY = 0x40000000, 0x40000010
_APIC_BUS_KHZ = 1_000_000

_AMD = ("AuthenticAMD", "HygonGenuine")


class Topology:
    """Sockets of cores of threads. One bit field of the APIC id each, so ids may have gaps."""

    __slots__ = ("core_bits", "cores", "cpus", "smt_bits", "sockets", "threads")

    def __init__(self, cores: int = 1, *, threads: int = 1, sockets: int = 1) -> None:
        """Raises ConfigError unless all are at least 1."""
        if min(cores, threads, sockets) < 1:
            raise ConfigError(
                f"a topology of {sockets} sockets, {cores} cores, {threads} threads has no CPU"
            )
        self.cores = cores
        self.threads = threads
        self.sockets = sockets
        self.cpus = cores * threads * sockets
        self.smt_bits = (threads - 1).bit_length()
        self.core_bits = (cores - 1).bit_length()

    @property
    def package_bits(self) -> int:
        """Low bits of an APIC id that tell CPUs of one socket apart."""
        return self.smt_bits + self.core_bits

    def apic_id(self, index: int) -> int:
        """The APIC id of vCPU ``index``: threads vary fastest, then cores, then sockets."""
        core, thread = divmod(index, self.threads)
        socket, core = divmod(core, self.cores)
        return socket << self.package_bits | core << self.smt_bits | thread

    def apic_ids(self) -> list[int]:
        return [self.apic_id(i) for i in range(self.cpus)]


class _Leaves:
    """Entries by (function, index), mutable."""

    __slots__ = ("by_key",)

    def __init__(self, entries: Iterable[Sequence[int]]) -> None:
        self.by_key = {(e[0], e[1]): list(e) for e in entries}

    def get(self, function: int, index: int = 0) -> list[int] | None:
        return self.by_key.get((function, index))

    def set(self, function: int, index: int, flags: int, *regs: int) -> None:
        self.by_key[function, index] = [function, index, flags, *regs]

    def drop(self, function: int) -> None:
        """Forget every subleaf; KVM answers zeros for a leaf that is not listed."""
        for key in [k for k in self.by_key if k[0] == function]:
            del self.by_key[key]

    def subleaves(self, function: int) -> list[list[int]]:
        return [e for k, e in self.by_key.items() if k[0] == function]

    def bit(self, function: int, index: int, reg: int, mask: int, on: bool) -> None:
        entry = self.get(function, index)
        if entry is not None:
            entry[reg] = entry[reg] | mask if on else entry[reg] & ~mask

    def has(self, function: int, index: int, reg: int, mask: int) -> bool:
        entry = self.get(function, index)
        return entry is not None and entry[reg] & mask == mask

    def entries(self) -> list[Entry]:
        return [(e[0], e[1], e[2], e[3], e[4], e[5], e[6]) for e in self.by_key.values()]


class Model:
    """The CPU of one machine: everything but what differs from vCPU to vCPU.

    ``entries(index)`` gives the table of one vCPU; a machine builds the model once.
    """

    def __init__(
        self,
        supported: Iterable[Sequence[int]],
        topology: Topology,
        *,
        edits: Sequence[Edit] = (),
        tsc_khz: int | None = None,
        hypervisor: bool = True,
        tsc_deadline: bool = True,
        x2apic: bool = True,
        pmu: bool = False,
    ) -> None:
        """``supported``: KVM_GET_SUPPORTED_CPUID. ``tsc_deadline``: KVM_CAP_TSC_DEADLINE_TIMER.
        Raises ConfigError for a feature this host cannot give."""
        self._leaves = leaves = _Leaves(supported)
        self.topology = topology
        self.vendor = vendor(leaves.entries())
        _features(leaves, x2apic=x2apic, tsc_deadline=tsc_deadline, pmu=pmu)
        _hypervisor(leaves, hypervisor, tsc_khz)
        if edits:
            _edit(leaves, edits)
        if self.vendor in _AMD:
            _amd_shared(leaves)
        _xsave(leaves)
        top = topology.apic_id(topology.cpus - 1)
        if top > 254 and not leaves.has(1, 0, ECX, _X2APIC):
            raise ConfigError(
                f"{topology.cpus} vCPUs need APIC ids up to {top}, which only x2apic has; "
                "ask for fewer with --cpus or leave x2apic on"
            )

    def entries(self, index: int) -> list[Entry]:
        """The table of vCPU ``index``, for KVM_SET_CPUID2."""
        leaves = _Leaves(self._leaves.by_key.values())
        apic_id = self.topology.apic_id(index)
        _leaf_1(leaves, self.topology, apic_id)
        _caches(leaves, self.topology)
        _extended_topology(leaves, self.topology, apic_id)
        if self.vendor in _AMD:
            _amd_topology(leaves, self.topology, apic_id)
        return leaves.entries()

    @property
    def mtrr(self) -> bool:
        """Whether the guest has MTRRs to set up."""
        return self._leaves.has(1, 0, EDX, _MTRR)


# ---- what every vCPU shares ---------------------------------------------------------------


def _features(leaves: _Leaves, *, x2apic: bool, tsc_deadline: bool, pmu: bool) -> None:
    # KVM emulates the x2APIC and the deadline timer whatever the host has. It does not emulate
    # MONITOR/MWAIT as more than a NOP, and sets OSXSAVE itself.
    leaves.bit(1, 0, ECX, _X2APIC, x2apic)
    leaves.bit(1, 0, ECX, _TSC_DEADLINE, tsc_deadline)
    leaves.bit(1, 0, ECX, _MONITOR | _OSXSAVE, False)
    leaves.drop(5)
    power = leaves.get(6)
    if power is not None:
        power[EAX:] = [power[EAX] & _ARAT, 0, 0, 0]
    # No enclave memory is given to guests.
    leaves.bit(7, 0, EBX, _SGX, False)
    leaves.bit(7, 0, ECX, _SGX_LC, False)
    leaves.drop(0x12)
    if not pmu:
        leaves.bit(1, 0, ECX, _PDCM, False)
        leaves.drop(0xA)
        leaves.bit(0x80000001, 0, ECX, _PERFCTR_CORE | _PERFCTR_NB | _PERFCTR_LLC, False)
        leaves.drop(0x80000022)
    leaves.drop(0x80000026)  # the host's topology, in a form newer than 0x8000001E


def _hypervisor(leaves: _Leaves, on: bool, tsc_khz: int | None) -> None:
    leaves.bit(1, 0, ECX, _HYPERVISOR, on)
    features = leaves.get(_KVM_BASE + 1)
    for key in [k for k in leaves.by_key if _KVM_BASE <= k[0] < _KVM_BASE + 0x10000]:
        del leaves.by_key[key]
    if not on or features is None:
        return
    top = _KVM_BASE + 1 if tsc_khz is None else _KVM_FREQUENCY
    leaves.set(_KVM_BASE, 0, 0, top, *_KVM_SIGNATURE)
    leaves.set(*features)
    if tsc_khz is not None:
        leaves.set(_KVM_FREQUENCY, 0, 0, tsc_khz, _APIC_BUS_KHZ, 0, 0)


def _edit(leaves: _Leaves, edits: Sequence[Edit]) -> None:
    table = cpu_features.table()
    for name, on in cpu_features.without(edits):
        f = table[name]
        if name in cpu_features.DERIVED:
            raise ConfigError(
                f"--cpu: '{name}' follows from the machine and the guest; leave it out"
            )
        if on and not leaves.has(f.leaf, f.subleaf, f.reg, f.mask):
            raise ConfigError(
                f"--cpu: '+{name}' cannot be had: this host's KVM does not offer {f}; leave it "
                "out, or use a host that has it"
            )
        leaves.bit(f.leaf, f.subleaf, f.reg, f.mask, on)


def _amd_shared(leaves: _Leaves) -> None:
    one, ext = leaves.get(1), leaves.get(0x80000001)
    if one is not None and ext is not None:
        ext[EDX] = ext[EDX] & ~_AMD_SHARED | one[EDX] & _AMD_SHARED


def _xsave(leaves: _Leaves) -> None:
    """Leaf 0xD and the features it serves must agree. Intel SDM vol 1 §13.2."""
    state = leaves.get(0xD, 0)
    if state is None or not leaves.has(1, 0, ECX, _XSAVE):
        leaves.drop(0xD)
        return
    for function, index, reg, mask, components in _XCR0:
        if not leaves.has(function, index, reg, mask):
            state[EAX] &= ~components
        elif state[EAX] & components != components:
            # KVM offers the instruction, but the process has no permission for its state.
            leaves.bit(function, index, reg, mask, False)
            for child in _children(mask, function, index, reg):
                leaves.bit(child.leaf, child.subleaf, child.reg, child.mask, False)
            state[EAX] &= ~components
    size = _XSAVE_LEGACY_SIZE
    for sub in leaves.subleaves(0xD):
        nr = sub[1]
        if nr < 2:
            continue
        # Supervisor components (ECX bit 0) are in IA32_XSS, not in XCR0.
        if sub[ECX] & 1 == 0:
            if state[EAX] >> nr & 1 == 0:
                del leaves.by_key[0xD, nr]
            else:
                size = max(size, sub[EAX] + sub[EBX])
    state[EBX] = _XSAVE_LEGACY_SIZE  # at reset XCR0 is 1; KVM follows the guest from there
    state[ECX] = size


def _children(mask: int, function: int, index: int, reg: int) -> list[cpu_features.Feature]:
    table = cpu_features.table()
    place = (function, index, reg, mask)
    for name, f in table.items():
        if (f.leaf, f.subleaf, f.reg, f.mask) == place:
            return [table[n] for n, _ in cpu_features.without([(name, False)])]
    return []


# ---- what differs from vCPU to vCPU -------------------------------------------------------


def _leaf_1(leaves: _Leaves, topo: Topology, apic_id: int) -> None:
    one = leaves.get(1)
    if one is None:
        return
    logical = 1 << topo.package_bits
    clflush = one[EBX] >> 8 & 0xFF or 8  # in units of 8 bytes
    one[EBX] = (apic_id & 0xFF) << 24 | min(logical, 255) << 16 | clflush << 8 | one[EBX] & 0xFF
    leaves.bit(1, 0, EDX, _HTT, logical > 1)


def _caches(leaves: _Leaves, topo: Topology) -> None:
    """Who shares each cache: threads of a core up to level 2, a socket from level 3 on."""
    for function in (4, 0x8000001D):
        for entry in leaves.subleaves(function):
            if entry[EAX] & 0x1F == 0:
                continue
            level = entry[EAX] >> 5 & 7
            sharing = topo.smt_bits if level < 3 else topo.package_bits
            entry[EAX] = entry[EAX] & 0x3FFF | min((1 << sharing) - 1, 0xFFF) << 14
            if function == 4:
                entry[EAX] |= min((1 << topo.core_bits) - 1, 0x3F) << 26


def _extended_topology(leaves: _Leaves, topo: Topology, apic_id: int) -> None:
    """Leaf 0xB, and 0x1F where the CPU has it. Intel SDM vol 2 CPUID."""
    zero = leaves.get(0)
    top = zero[EAX] if zero is not None else 0
    for function in (0xB, 0x1F):
        leaves.drop(function)
        if top < function:
            continue
        f = _SIGNIFICANT_INDEX
        per_socket = topo.threads * topo.cores
        leaves.set(function, 0, f, topo.smt_bits, topo.threads, 1 << 8, apic_id)
        leaves.set(function, 1, f, topo.package_bits, per_socket, 2 << 8 | 1, apic_id)
        leaves.set(function, 2, f, 0, 0, 2, apic_id)


def _amd_topology(leaves: _Leaves, topo: Topology, apic_id: int) -> None:
    """Leaves 0x80000008 and 0x8000001E. AMD APM vol 3 appendix E.4."""
    per_socket = topo.threads * topo.cores
    leaves.bit(0x80000001, 0, ECX, _CMP_LEGACY, per_socket > 1)
    sizes = leaves.get(0x80000008)
    if sizes is not None:
        sizes[ECX] = topo.package_bits << 12 | min(per_socket - 1, 0xFF)
    ids = leaves.get(0x8000001E)
    if ids is not None:
        core = apic_id >> topo.smt_bits & ((1 << topo.core_bits) - 1)
        ids[EAX] = apic_id
        ids[EBX] = (topo.threads - 1) << 8 | core & 0xFF
        ids[ECX] = apic_id >> topo.package_bits & 0xFF
        ids[EDX] = 0


# ---- reading a table ----------------------------------------------------------------------


def vendor(entries: Iterable[Sequence[int]]) -> str:
    """``GenuineIntel``, ``AuthenticAMD``...; empty if leaf 0 is missing."""
    for e in entries:
        if e[0] == 0:
            raw = b"".join(e[r].to_bytes(4, "little") for r in (EBX, EDX, ECX))
            return raw.decode("latin-1")
    return ""


def describe(entries: Iterable[Sequence[int]]) -> list[str]:
    """A CPUID table for people: vendor, model, addresses, features; one line each."""
    leaves = _Leaves(entries)
    one = leaves.get(1) or [0] * 7
    family, model = one[EAX] >> 8 & 0xF, one[EAX] >> 4 & 0xF
    if family in (6, 15):
        model |= one[EAX] >> 12 & 0xF0
    if family == 15:
        family += one[EAX] >> 20 & 0xFF
    brand = b"".join(
        e[r].to_bytes(4, "little")
        for e in (leaves.get(0x80000002 + i) for i in range(3))
        if e is not None
        for r in (EAX, EBX, ECX, EDX)
    )
    name = brand.split(b"\0")[0].decode("latin-1").strip() or "no brand string"
    sizes = (leaves.get(0x80000008) or [0] * 7)[EAX]
    who = vendor(leaves.entries())
    lines = [
        f"{who} family {family} model {model} stepping {one[EAX] & 0xF}: {name}",
        f"addresses: {sizes & 0xFF} bits physical, {sizes >> 8 & 0xFF} bits virtual",
    ]
    return [*lines, "features: " + " ".join(cpu_features.present(leaves.entries()))]

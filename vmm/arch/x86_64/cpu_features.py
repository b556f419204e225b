"""CPU features by name: where each one's bit is, and ``--cpu host,-x2apic,+pcid``.

Names are those of /proc/cpuinfo; QEMU's spellings are understood too (``-``, ``.`` and ``_`` do
not count, and the names that differ are listed as aliases).
"""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    #: Feature name and whether it is wanted.
    Edit = tuple[str, bool]
    #: function, index, flags, eax, ebx, ecx, edx: struct kvm_cpuid_entry2.
    Entry = tuple[int, int, int, int, int, int, int]

#: Where eax..edx are in an entry.
EAX, EBX, ECX, EDX = 3, 4, 5, 6

_REGISTERS = {EAX: "EAX", EBX: "EBX", ECX: "ECX", EDX: "EDX"}

# The 32 bits of each register in order from bit 0; "-" is a bit without a name, "=n" skips to
# bit n. Intel SDM vol 2 CPUID, AMD APM vol 3 appendix E, KVM cpuid.rst.
_BITS: dict[tuple[int, int, int], str] = {
    (1, 0, ECX): """pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16
        xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave
        avx f16c rdrand hypervisor""",
    (1, 0, EDX): """fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn
        clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe""",
    (7, 0, EBX): """fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx
        rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf
        avx512er avx512cd sha_ni avx512bw avx512vl""",
    (7, 0, ECX): """prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes
        vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 =22 rdpid =24
        bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks""",
    (7, 0, EDX): """=2 avx512_4vnniw avx512_4fmaps fsrm =8 avx512_vp2intersect srbds_ctrl md_clear
        rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt =22
        amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities
        core_capabilities ssbd""",
    (7, 1, EAX): """=4 avx_vnni avx512_bf16 =7 cmpccxadd =10 fzrm fsrs fsrc =17 fred lkgs =21
        amx_fp16 =23 avx_ifma =26 lam""",
    (0xD, 1, EAX): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (6, 0, EAX): "=2 arat",
    (0x80000001, 0, ECX): """lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse
        3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext
        perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx""",
    (0x80000001, 0, EDX): """=11 syscall =19 mp nx - mmxext =25 fxsr_opt pdpe1gb rdtscp - lm
        3dnowext 3dnow""",
    (0x80000007, 0, EDX): "=8 invtsc",
    (0x80000008, 0, EBX): """clzero irperf xsaveerptr =9 wbnoinvd =12 ibpb =14 ibrs amd_stibp =17
        stibp_always_on =24 amd_ssbd virt_ssbd amd_ssb_no""",
    (0x8000000A, 0, EDX): """npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid
        decodeassists =10 pausefilter =12 pfthreshold avic =15 v_vmsave_vmload vgif""",
    (0x40000001, 0, EAX): """- kvm_nopiodelay kvm_mmu - kvm_asyncpf kvm_steal_time kvm_pv_eoi
        kvm_pv_unhalt =9 kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_ipi kvm_poll_control
        kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range
        kvm_migration_control =24 kvmclock_stable_bit""",
}

# Features that are more than one bit: the clock has an old and a new pair of MSRs.
_KVMCLOCK = 1 << 0 | 1 << 3

_ALIASES = {
    "sse3": "pni",
    "ssse1": "ssse3",
    "tscdeadline": "tsc_deadline_timer",
    "nonstoptsc": "invtsc",
    "ffxsr": "fxsr_opt",
    "i64": "lm",
    "xd": "nx",
    "popcount": "popcnt",
    "lzcnt": "abm",
    "intelstibp": "stibp",
    "amdibpb": "ibpb",
    "amdibrs": "ibrs",
    "kvmpvclock": "kvmclock",
    "steal": "kvm_steal_time",
    "pvtlbflush": "kvm_pv_tlb_flush",
    "pvunhalt": "kvm_pv_unhalt",
}

#: Bits that say what the machine is or what the guest did; no choice of the user's.
DERIVED = ("ht", "cmp_legacy", "osxsave")

# A feature and those that make no sense without it.
_NEEDED_BY = {
    "xsave": ("avx", "pku", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd", "mpx", "amx_tile"),
    "avx": ("avx2", "fma", "f16c", "xop", "fma4", "vaes", "vpclmulqdq", "avx_vnni", "avx_ifma"),
    "avx2": ("avx512f",),
    "avx512f": (
        "avx512dq", "avx512ifma", "avx512pf", "avx512er", "avx512cd", "avx512bw", "avx512vl",
        "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq",
        "avx512_4vnniw", "avx512_4fmaps", "avx512_vp2intersect", "avx512_fp16", "avx512_bf16",
    ),
    "amx_tile": ("amx_bf16", "amx_int8", "amx_fp16"),
    "lm": ("la57", "pcid"),
}  # fmt: skip


class Feature:
    """One feature: ``mask`` in register ``reg`` (EAX..EDX) of a leaf and subleaf."""

    __slots__ = ("leaf", "mask", "name", "reg", "subleaf")

    def __init__(self, name: str, leaf: int, subleaf: int, reg: int, mask: int) -> None:
        self.name = name
        self.leaf = leaf
        self.subleaf = subleaf
        self.reg = reg
        self.mask = mask

    def __str__(self) -> str:
        """Where it is, as people write it: ``CPUID.7.0:EBX[16]``."""
        bits = ",".join(str(i) for i in range(32) if self.mask >> i & 1)
        return f"CPUID.{self.leaf:X}.{self.subleaf}:{_REGISTERS[self.reg]}[{bits}]"


_table: dict[str, Feature] = {}


def table() -> dict[str, Feature]:
    """Canonical name → feature; parsed on first use, since a plain boot never needs it."""
    if not _table:
        for (leaf, subleaf, reg), names in _BITS.items():
            bit = 0
            for name in names.split():
                if name[0] == "=":
                    bit = int(name[1:])
                    continue
                if name != "-":
                    _table[name] = Feature(name, leaf, subleaf, reg, 1 << bit)
                bit += 1
        _table["kvmclock"] = Feature("kvmclock", 0x40000001, 0, EAX, _KVMCLOCK)
    return _table


def _squash(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(".", "")


def find(name: str) -> str:
    """The canonical name for a spelling. Raises ConfigError with the nearest known name."""
    key = _squash(name)
    if key in _ALIASES:
        return _ALIASES[key]
    known = {_squash(n): n for n in table()}
    if key in known:
        return known[key]
    import difflib

    near = difflib.get_close_matches(key, [*known, *_ALIASES], 1)
    hint = (
        f"did you mean '{known.get(near[0]) or _ALIASES[near[0]]}'?" if near else "see 'vmm doctor'"
    )
    raise ConfigError(f"--cpu: '{name}' is no CPU feature vmm knows; {hint}")


def parse_cpu(text: str) -> list[Edit]:
    """``host[,+name][,-name][,name=on|off]...`` → edits in order. Raises ConfigError."""
    model, *items = [part.strip() for part in text.split(",")]
    if model != "host":
        raise ConfigError(f"--cpu: '{model}' is no CPU model; the only one is 'host'")
    edits: list[Edit] = []
    for item in items:
        if item[:1] in ("+", "-") and len(item) > 1:
            edits.append((find(item[1:]), item[0] == "+"))
            continue
        name, sep, state = item.partition("=")
        if not sep or not name or state not in ("on", "off"):
            raise ConfigError(f"--cpu: '{item}' is not +NAME, -NAME, NAME=on or NAME=off")
        edits.append((find(name), state == "on"))
    return edits


def without(edits: Iterable[Edit]) -> list[Edit]:
    """The edits, the last word on each name, with the removal of what cannot stand without what
    they remove. Raises ConfigError if they ask for such a feature all the same."""
    final = dict(edits)
    queue = [name for name, on in final.items() if not on]
    while queue:
        for child in _NEEDED_BY.get(queue.pop(), ()):
            if final.get(child):
                parent = next(p for p, c in _NEEDED_BY.items() if child in c)
                raise ConfigError(f"--cpu: '+{child}' cannot be had together with '-{parent}'")
            if child not in final:
                final[child] = False
                queue.append(child)
    return list(final.items())


def present(entries: Iterable[Entry]) -> list[str]:
    """Canonical names of the features whose bits are all set, in table order."""
    regs = {(e[0], e[1]): e for e in entries}
    found = []
    for name, f in table().items():
        entry = regs.get((f.leaf, f.subleaf))
        if entry is not None and entry[f.reg] & f.mask == f.mask:
            found.append(name)
    return found

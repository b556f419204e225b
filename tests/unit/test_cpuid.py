"""CPUID tables: what is fixed up, what is edited, and that leaves agree with each other."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.cpuid_tables import Entry, amd, intel
from vmm.arch.x86_64 import cpu_features, cpuid
from vmm.arch.x86_64.cpu_features import EAX, EBX, ECX, EDX, parse_cpu
from vmm.arch.x86_64.cpuid import Model, Topology
from vmm.errors import ConfigError

HOSTS = {"intel": intel, "amd": amd}


class Table:
    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.by_key = {(e[0], e[1]): e for e in entries}
        assert len(self.by_key) == len(entries)

    def __getitem__(self, key: tuple[int, int, int]) -> int:
        """Register of a leaf; what is not listed reads as zero, as KVM answers."""
        entry = self.by_key.get(key[:2])
        return entry[key[2]] if entry else 0

    def names(self) -> set[str]:
        return set(cpu_features.present(self.entries))


def make(host: str = "intel", topo: Topology | None = None, cpu: str = "host") -> Model:
    return Model(HOSTS[host](), topo or Topology(), edits=parse_cpu(cpu))


def table(host: str = "intel", cpu: str = "host", index: int = 0, **topo: int) -> Table:
    return Table(make(host, Topology(**topo), cpu).entries(index))


# ---- topology -----------------------------------------------------------------------------

topologies = st.builds(
    Topology, st.integers(1, 24), threads=st.integers(1, 4), sockets=st.integers(1, 4)
)


@given(topologies)
def test_apic_ids_are_distinct_and_ordered(topo: Topology) -> None:
    ids = topo.apic_ids()
    assert len(ids) == topo.cpus
    assert ids == sorted(set(ids))


def test_one_socket_of_plain_cores_numbers_without_gaps() -> None:
    assert Topology(5).apic_ids() == [0, 1, 2, 3, 4]
    assert Topology(3, threads=2, sockets=2).apic_ids() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


def test_a_topology_without_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 cores"):
        Topology(0)


@given(topologies, st.sampled_from(sorted(HOSTS)), st.data())
def test_every_leaf_tells_the_same_topology(topo: Topology, host: str, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, topo.cpus - 1))
    if topo.apic_id(topo.cpus - 1) > 254:
        return
    t = Table(make(host, topo).entries(index))
    apic_id = topo.apic_id(index)
    assert t[1, 0, EBX] >> 24 == apic_id
    assert {t[0xB, i, EDX] for i in range(3)} == {apic_id}
    assert t[0xB, 0, EBX] == topo.threads
    assert t[0xB, 1, EBX] == topo.threads * topo.cores
    # An OS shifts the id by what each level says and must find the thread, core and socket.
    smt, package = t[0xB, 0, EAX], t[0xB, 1, EAX]
    core, thread = divmod(index, topo.threads)
    socket, core = divmod(core, topo.cores)
    assert apic_id & ((1 << smt) - 1) == thread
    assert (apic_id & ((1 << package) - 1)) >> smt == core
    assert apic_id >> package == socket
    assert bool(t[1, 0, EDX] >> 28 & 1) == (topo.threads * topo.cores > 1)
    assert t[1, 0, EBX] >> 16 & 0xFF == min(1 << package, 255)
    if host == "amd":
        assert t[0x8000001E, 0, EAX] == apic_id
        assert t[0x8000001E, 0, EBX] == (topo.threads - 1) << 8 | core
        assert t[0x8000001E, 0, ECX] == socket
        assert t[0x80000008, 0, ECX] == package << 12 | topo.threads * topo.cores - 1
        assert t[0x80000001, 0, ECX] >> 1 & 1 == (topo.threads * topo.cores > 1)
    else:
        assert t[0x1F, 0, EBX] == topo.threads
        assert t[0x80000008, 0, ECX] == 0


@pytest.mark.parametrize(("host", "leaf"), [("intel", 4), ("amd", 0x8000001D)])
def test_cache_sharing_follows_the_topology(host: str, leaf: int) -> None:
    t = table(host, cores=4, threads=2)
    assert [t[leaf, i, EAX] >> 14 & 0xFFF for i in range(4)] == [1, 1, 1, 7]
    assert [t[leaf, i, EAX] & 0x3FFF for i in range(4)] == [
        e[EAX] & 0x3FFF for e in HOSTS[host]() if e[0] == leaf and e[1] < 4
    ]
    assert t[leaf, 0, EAX] >> 26 == (3 if host == "intel" else 0)
    assert t[leaf, 4, EAX] == 0  # the end of the list stays the end


def test_apic_ids_past_a_byte_need_x2apic() -> None:
    assert len(make("intel", Topology(300)).entries(299)) > 10
    with pytest.raises(ConfigError, match="300 vCPUs need APIC ids up to 299"):
        make("intel", Topology(300), "host,-x2apic")


def test_an_old_cpu_without_leaf_0xb_gets_none() -> None:
    old = [e for e in intel() if e[0] not in (0, 0xB)]
    old.append((0, 0, 0, 7, 0x756E6547, 0x6C65746E, 0x49656E69))
    t = Table(Model(old, Topology(2)).entries(1))
    assert (0xB, 0) not in t.by_key


# ---- features -----------------------------------------------------------------------------


def test_what_kvm_emulates_is_there_and_what_it_cannot_is_not() -> None:
    names = table("intel").names()
    assert {"x2apic", "tsc_deadline_timer", "hypervisor", "arat", "avx512f"} <= names
    assert not {"monitor", "osxsave", "pdcm", "sgx", "sgx_lc"} & names
    t = table("intel")
    for leaf in (5, 0xA, 0x12):
        assert all(t[leaf, 0, r] == 0 for r in (EAX, EBX, ECX, EDX))
    assert [t[6, 0, r] for r in (EAX, EBX, ECX, EDX)] == [1 << 2, 0, 0, 0]


def test_amd_counters_and_new_topology_leaf_are_gone() -> None:
    t = table("amd")
    assert not {"perfctr_core", "perfctr_nb", "perfctr_llc"} & t.names()
    assert t[0x80000022, 0, EAX] == 0
    assert t[0x80000026, 0, EBX] == 0


def test_the_pmu_stays_when_asked_for() -> None:
    t = Table(Model(intel(), Topology(), pmu=True).entries(0))
    assert t[0xA, 0, EAX] == 0x08300805
    assert "pdcm" in t.names()


def test_switches_off() -> None:
    m = Model(intel(), Topology(), x2apic=False, tsc_deadline=False, hypervisor=False)
    t = Table(m.entries(0))
    assert not {"x2apic", "tsc_deadline_timer", "hypervisor", "kvmclock"} & t.names()
    assert not any(0x40000000 <= e[0] < 0x40010000 for e in t.entries)


def test_kvm_leaves() -> None:
    t = table("intel")
    assert t[0x40000000, 0, EAX] == 0x40000001
    raw = b"".join(t[0x40000000, 0, r].to_bytes(4, "little") for r in (EBX, ECX, EDX))
    assert raw == b"KVMKVMKVM\0\0\0"
    assert t[0x40000001, 0, EAX] == 0x01007EFB
    with_tsc = Table(Model(intel(), Topology(), tsc_khz=2_100_000).entries(0))
    assert with_tsc[0x40000000, 0, EAX] == 0x40000010
    assert with_tsc[0x40000010, 0, EAX] == 2_100_000
    assert with_tsc[0x40000010, 0, EBX] == 1_000_000


def test_the_supported_table_is_not_changed() -> None:
    given_table = intel()
    Model(given_table, Topology(4), edits=parse_cpu("host,-avx")).entries(2)
    assert given_table == intel()


# ---- XSAVE --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "xcr0", "size"),
    [
        ("host", 0x2E7, 0xA88),
        ("host,-pku", 0xE7, 0xA80),
        ("host,-avx512f", 0x207, 0xA88),
        ("host,-avx,-pku", 0x3, 576),
    ],
)
def test_xsave_area_fits_the_features(cpu: str, xcr0: int, size: int) -> None:
    t = table("intel", cpu)
    assert t[0xD, 0, EAX] == xcr0
    assert t[0xD, 0, ECX] == size
    assert t[0xD, 0, EBX] == 576
    listed = {e[1] for e in t.entries if e[0] == 0xD and e[1] > 1}
    assert listed == {i for i in range(2, 32) if xcr0 >> i & 1}


def test_without_xsave_there_is_no_leaf_0xd() -> None:
    t = table("intel", "host,-xsave")
    assert not [e for e in t.entries if e[0] == 0xD]
    assert not {"avx", "avx2", "avx512f", "fma", "pku", "xsaves"} & t.names()


def test_a_feature_whose_state_kvm_withholds_is_withheld() -> None:
    no_amx = [e if e[0] != 7 or e[1] else (*e[:6], e[6] | 7 << 22) for e in intel()]
    assert "amx_tile" in cpu_features.present(no_amx)
    names = Table(Model(no_amx, Topology()).entries(0)).names()
    assert not {"amx_tile", "amx_int8", "amx_bf16"} & names


def test_supervisor_components_stay() -> None:
    assert (0xD, 11) in table("amd", "host,-avx").by_key


# ---- --cpu --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        ("host", []),
        ("host,-x2apic,+pcid", [("x2apic", False), ("pcid", True)]),
        ("host, tsc-deadline=off", [("tsc_deadline_timer", False)]),
        ("host,+sse4.1", [("sse4_1", True)]),
        ("host,+sse4-2,+sse3", [("sse4_2", True), ("pni", True)]),
        ("host,avx512vnni=on", [("avx512_vnni", True)]),
        ("host,-kvm-pv-eoi,-KVMclock", [("kvm_pv_eoi", False), ("kvmclock", False)]),
    ],
)
def test_parse_cpu(text: str, edits: list[tuple[str, bool]]) -> None:
    assert parse_cpu(text) == edits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qemu64", "'qemu64' is no CPU model"),
        ("", "'' is no CPU model"),
        ("host,avx", r"'avx' is not \+NAME"),
        ("host,+", r"'\+' is not \+NAME"),
        ("host,avx=maybe", "'avx=maybe' is not"),
        ("host,-x2apci", "'x2apci' is no CPU feature vmm knows; did you mean 'x2apic'"),
        ("host,+tsc-deadlin", "did you mean 'tsc_deadline_timer'"),
    ],
)
def test_parse_cpu_refuses_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cpu(text)


@given(st.text(max_size=40))
def test_parse_cpu_raises_nothing_else(text: str) -> None:
    for prefix in ("", "host,", "host,+"):
        with contextlib.suppress(ConfigError):
            assert isinstance(parse_cpu(prefix + text), list)


def test_a_feature_the_host_lacks_is_named_with_its_bit() -> None:
    with pytest.raises(ConfigError, match=r"'\+svm' cannot be had.*CPUID\.80000001\.0:ECX\[2\]"):
        table("intel", "host,+svm")


def test_the_last_word_counts() -> None:
    assert "avx2" in table("intel", "host,-avx2,+avx2").names()
    assert "avx2" not in table("intel", "host,+avx2,-avx2").names()


def test_dependents_go_too_and_cannot_be_asked_for() -> None:
    names = table("intel", "host,-avx").names()
    assert not {"avx2", "fma", "avx512f", "avx512bw", "avx512_vnni"} & names
    assert {"xsave", "sse4_2"} <= names
    with pytest.raises(ConfigError, match=r"'\+avx2' cannot be had together with '-avx'"):
        table("intel", "host,-avx,+avx2")


def test_amd_repeats_leaf_1_bits() -> None:
    assert table("amd")[0x80000001, 0, EDX] & 1 << 5
    t = table("amd", "host,-msr")
    assert t[1, 0, EDX] & 1 << 5 == 0
    assert t[0x80000001, 0, EDX] & 1 << 5 == 0


feature_names = st.sampled_from(sorted(set(cpu_features.table()) - set(cpu_features.DERIVED)))


@pytest.mark.parametrize("name", cpu_features.DERIVED)
@pytest.mark.parametrize("sign", ["+", "-"])
def test_what_follows_from_the_machine_is_not_edited(name: str, sign: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' follows from the machine"):
        table("amd", f"host,{sign}{name}")


@given(feature_names, st.sampled_from(sorted(HOSTS)))
def test_any_feature_can_be_taken_away(name: str, host: str) -> None:
    assert name not in table(host, f"host,-{name}").names()


@given(feature_names, st.sampled_from(sorted(HOSTS)))
def test_any_feature_is_granted_or_refused_never_forgotten(name: str, host: str) -> None:
    if name in table(host).names():
        assert name in table(host, f"host,+{name}").names()
    else:
        with pytest.raises(ConfigError, match=name):
            table(host, f"host,+{name}")


# ---- the table of names -------------------------------------------------------------------


def test_names_are_unique_however_they_are_spelt() -> None:
    squashed = [cpu_features._squash(n) for n in cpu_features.table()]
    assert len(set(squashed)) == len(squashed)
    for name in cpu_features.table():
        assert cpu_features.find(name) == name
        assert cpu_features.find(name.replace("_", "-").upper()) == name
    for alias, target in cpu_features._ALIASES.items():
        assert target in cpu_features.table()
        assert alias not in squashed


def test_dependencies_name_known_features() -> None:
    for parent, children in cpu_features._NEEDED_BY.items():
        assert {parent, *children} <= set(cpu_features.table())


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("x2apic", "CPUID.1.0:ECX[21]"),
        ("hypervisor", "CPUID.1.0:ECX[31]"),
        ("pbe", "CPUID.1.0:EDX[31]"),
        ("avx512vl", "CPUID.7.0:EBX[31]"),
        ("pks", "CPUID.7.0:ECX[31]"),
        ("la57", "CPUID.7.0:ECX[16]"),
        ("ssbd", "CPUID.7.0:EDX[31]"),
        ("ibt", "CPUID.7.0:EDX[20]"),
        ("lam", "CPUID.7.1:EAX[26]"),
        ("xsaves", "CPUID.D.1:EAX[3]"),
        ("topoext", "CPUID.80000001.0:ECX[22]"),
        ("mwaitx", "CPUID.80000001.0:ECX[29]"),
        ("lm", "CPUID.80000001.0:EDX[29]"),
        ("invtsc", "CPUID.80000007.0:EDX[8]"),
        ("virt_ssbd", "CPUID.80000008.0:EBX[25]"),
        ("kvm_steal_time", "CPUID.40000001.0:EAX[5]"),
        ("kvm_pv_tlb_flush", "CPUID.40000001.0:EAX[9]"),
        ("kvmclock", "CPUID.40000001.0:EAX[0,3]"),
    ],
)
def test_bits_are_where_the_manuals_print_them(name: str, place: str) -> None:
    assert str(cpu_features.table()[name]) == place


def test_every_register_has_at_most_32_bits() -> None:
    assert all(f.mask < 1 << 32 for f in cpu_features.table().values())


def test_describe() -> None:
    lines = cpuid.describe(make("intel").entries(0))
    assert lines[0] == "GenuineIntel family 6 model 167 stepping 8: Testing CPU"
    assert lines[1] == "addresses: 52 bits physical, 57 bits virtual"
    assert " x2apic " in lines[2]
    assert cpuid.describe(amd())[0].startswith("AuthenticAMD family 25 model 33")

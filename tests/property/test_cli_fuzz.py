"""Whatever is typed, and whatever a guest left behind: no surprise comes out."""

from __future__ import annotations

import contextlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from vmm._native import ffi
from vmm.arch.x86_64.inspect import Snapshot
from vmm.cli.parse import flags_of, parse
from vmm.config import MachineConfig
from vmm.diagnose import diagnose, fields
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

FLAGS = sorted(flags_of("run"))
words = st.one_of(
    st.sampled_from(FLAGS),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.text(max_size=8)),
    st.builds("{}{}".format, st.sampled_from([f for f in FLAGS if len(f) == 2]), st.text()),
    st.text(max_size=8),
)


@given(st.lists(words, max_size=6), st.sampled_from(["run", "nested", "doctor"]))
def test_any_command_line_is_understood_or_refused(argv: list[str], command: str) -> None:
    with contextlib.suppress(ConfigError):
        parsed = parse(argv, command, takes_rest=command == "nested")
        if command == "run":
            known = {k: v for k, v in parsed.values.items() if k in MachineConfig.__annotations__}
            MachineConfig(**known).problems()


u64 = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1 << 21),
    st.sampled_from([0, 0x1000, 0xFFFF_FFFF_8100_0000, (1 << 64) - 1, 1 << 63, 0xFFFF_FFFF]),
)
controls = st.sampled_from([0, 1, 0x8000_0001, 0x20, 0x30, 0x1020, 0x500, 0xFFFF_FFFF])
# Words that look like entries of page tables, and any other.
entries = st.one_of(u64, st.integers(0, 63).map(lambda n: n << 12 | 0x83), st.just(0x1003))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(u64, min_size=18, max_size=18),
    st.tuples(controls, u64, u64, controls, controls),
    st.tuples(st.integers(0, 1), st.integers(0, 1), u64, st.integers(0, 0xFFFF)),
    st.lists(st.tuples(st.integers(0, 0x7FFF), entries), max_size=64),
    st.sampled_from([None, *range(12)]),
    st.lists(u64, min_size=8, max_size=8),
)
def test_any_state_can_be_diagnosed(
    general: list[int],
    control: tuple[int, ...],
    segment: tuple[int, ...],
    words: list[tuple[int, int]],
    kind: int | None,
    extra: list[int],
) -> None:
    regs = ffi.new("struct kvm_regs *", general)
    sregs = ffi.new("struct kvm_sregs *")
    sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer = control
    sregs.cs.l, sregs.cs.db, sregs.cs.base, sregs.idt.limit = segment
    event = None
    if kind is not None:
        event = ffi.new("struct vmm_event *", {"kind": kind, "extra": extra})
    history = ffi.new("struct vmm_exit[]", 2)
    history[0] = {"reason": extra[0] & 0xFF, "addr": extra[1], "size": extra[2] & 0xFF}
    memory = GuestMemory([(0, 1 << 18)])
    try:
        for at, value in words:
            memory.write(8 * at, struct.pack("<Q", value))
        snap = Snapshot(0, fields(regs[0]), fields(sregs[0]))
        text = diagnose([snap] * 3, memory, event, "", [list(history[0:2])])
    finally:
        memory.close()
    assert "vCPU 0: " in text

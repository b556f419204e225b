"""Disks: fio in a Linux guest, beside QEMU with an iothread, on the same image in turn.

``python -m bench.blk [--rounds N] [--rows NAME,...] [--cache MODE] [--cpus N] [--seconds S]``
measures where Linux boots; elsewhere put ``vmm nested --`` before it. The table gives medians:
operations or MiB a second, the 50th and 99th percentile of latency in µs, and ratios to QEMU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.boot import ROOT, Argv, prepare, qemu, vmm
from guests.fio import fio_archive
from guests.initramfs import build, kernel_tree

SIZE_MIB = 192
DEADLINE_S = 220

#: fio's arguments by the row's name.
ROWS = {
    "randread-qd1": "--rw=randread --bs=4k --iodepth=1",
    "randread-qd32": "--rw=randread --bs=4k --iodepth=32",
    "randwrite-qd1": "--rw=randwrite --bs=4k --iodepth=1",
    "randwrite-qd32": "--rw=randwrite --bs=4k --iodepth=32",
    "read-1m": "--rw=read --bs=1m --iodepth=4",
    "write-1m": "--rw=write --bs=1m --iodepth=4",
    "randread-jobs": "--rw=randread --bs=4k --iodepth=32 --numjobs=2",
}

#: fio's terse fields: bandwidth and IOPS of reads and writes, and their latencies' percentiles.
AWK = r"""{p = ""; for (i = 18; i <= 78; i++) if ($i ~ /^(50|99)\.0/) {
split($i, v, "="); if (v[2] > 0) p = p " " v[2]}; print "row=" n, $7 + $48, $8 + $49 p}"""

SCRIPT = """\
for row in {rows}; do
    case $row in
{cases}
    esac
    fio --name=$row --filename=/dev/vda --direct=1 --ioengine=libaio --thread --group_reporting \\
        --time_based --runtime={seconds} --norandommap --minimal $args 2>/dev/null |
        awk -F';' -v n=$row '{awk}'
done
poweroff -f
"""


def initrd(rows: list[str], seconds: int, scratch: Path) -> str:
    cases = "\n".join(f'{name}) args="{ROWS[name]}" ;;' for name in rows)
    script = SCRIPT.replace("{rows}", " ".join(rows)).replace("{cases}", cases)
    script = script.replace("{seconds}", str(seconds)).replace("{awk}", AWK)
    both = scratch / "bench.cpio"
    parts = [path.read_bytes() for path in (build(script, kernel_tree()), fio_archive())]
    both.write_bytes(b"".join(part + bytes(-len(part) % 512) for part in parts))
    return str(both)


def contenders(image: str, cache: str, cpus: int) -> dict[str, Argv]:
    return {
        "vmm": vmm("-c", str(cpus), "--disk", f"{image},cache={cache},queues={cpus}"),
        "qemu": qemu(
            "q35", "-smp", str(cpus), "-object", "iothread,id=io",
            "-drive", f"if=none,id=d,file={image},format=raw,cache={cache},aio=io_uring",
            "-device", f"virtio-blk-pci,drive=d,iothread=io,num-queues={cpus}",
        ),
    }  # fmt: skip


def measure(argv: list[str]) -> dict[str, list[float]]:
    """By row: KiB a second, operations a second, p50 and p99 in µs."""
    done = subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    found = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        if "row=" in line:
            name, *figures = line.split("row=")[1].split()
            found[name] = [float(figure) for figure in figures[:4]]
    if not found:
        raise SystemExit(f"bench: {argv[0]} measured nothing; it printed:\n{done.stdout.decode()}")
    return found


def report(figures: dict[str, list[dict[str, list[float]]]], rows: list[str]) -> None:
    print(f"{'':16}{'':6}{'MiB/s':>10}{'ops/s':>10}{'p50 µs':>10}{'p99 µs':>10}   ratio to qemu")
    for row in rows:
        medians = {
            name: [
                statistics.median(column) for column in zip(*(r[row] for r in runs), strict=True)
            ]
            for name, runs in figures.items()
        }
        for name, (kib, *rest) in medians.items():
            cells = "".join(f"{value:10.0f}" for value in rest)
            ratios = "  ".join(
                f"{mine / its:.2f}"
                for mine, its in zip(medians[name], medians["qemu"], strict=True)
            )
            print(f"{row:16}{name:6}{kib / 1024:10.1f}{cells}   {ratios}")


def main(argv: list[str]) -> int:
    options = {"--rounds": "3", "--rows": ",".join(ROWS), "--cache": "writeback", "--cpus": "2"}
    options["--seconds"] = "2"
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        if flag not in options:
            raise SystemExit(f"bench.blk: unknown argument {flag}")
        options[flag] = value
    rows, cpus = options["--rows"].split(","), int(options["--cpus"])
    kernel = prepare()[0]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as place:
        archive = initrd(rows, int(options["--seconds"]), Path(place))
        image = Path(place) / "disk.img"
        image.write_bytes(os.urandom(1 << 20) * SIZE_MIB)
        chosen = contenders(str(image), options["--cache"], cpus)
        figures: dict[str, list[dict[str, list[float]]]] = {name: [] for name in chosen}
        for turn in range(int(options["--rounds"])):
            for name, make in chosen.items():
                figures[name].append(measure(make(kernel, archive)))
                print(f"round {turn} {name}: {figures[name][-1]}", flush=True)
    print(f"\nmedians of {options['--rounds']} interleaved rounds, cache={options['--cache']}")
    report(figures, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

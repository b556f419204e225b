"""A long mixed load on one Linux guest: disks that verify, streams, and drivers torn off devices.

Round after round, until the time is up, on two CPUs with a queue each: fio writes and verifies
checksums on one disk; meanwhile a second disk's driver is unbound under load and bound again, after
which fio writes and verifies there too; and streams run both ways over a tap, whose driver is
unbound and bound in the middle of one. What the guest finds wrong, and what vmm's process uses
(descriptors, threads, memory that is not the guest's), is told at the end.

``python -m bench soak [--minutes N] [--without net|reset]``. Status 1 if anything was lost, or if
descriptors or memory grew.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.boot import ROOT, machine, vmm
from bench.net import GUEST, HOST, PORT, TAP, serving
from bench.net import prepare as prepare
from guests.fetch import fetch
from guests.fio import fio_archive
from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from guests.tools import archive

DISK_MIB = 64
SAMPLE_S = 5.0
#: Memory may grow by so much from the first quarter to the last: allocators keep some.
SLACK_KIB = 2048

SCRIPT = """\
bad() {{ echo "bad=$*"; }}
card() {{ ip addr add {guest}/24 dev eth0; ip link set eth0 up; }}
verify() {{ # name, file, KiB written
    fio --name=$1 --filename=$2 --rw=randwrite --bsrange=4k-64k --size={mib}M --io_size=$3k \\
        --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --do_verify=1 \\
        --verify_fatal=1 --verify_state_save=0 --randseed=$round --thread > /tmp/$1.log 2>&1 ||
        {{ bad "round $round: $1"; tail -20 /tmp/$1.log; }}
}}
rebind() {{ # driver, device
    echo $2 > /sys/bus/virtio/drivers/$1/unbind
    echo $2 > /sys/bus/virtio/drivers/$1/bind || bad "round $round: bind $1"
}}
device() {{ basename $(readlink -f $1/device); }}
second=$(device /sys/block/vdb)
reset={reset}
net={net}
if [ $net = 1 ]; then card; card_device=$(device /sys/class/net/eth0); fi
round=0
end=$(($(date +%s) + {seconds}))
while [ $(date +%s) -lt $end ]; do
    round=$((round + 1))
    verify vda /dev/vda 16384 &
    disk=$!
    if [ $reset = 1 ]; then
        fio --name=torn --filename=/dev/vdb --rw=randwrite --bs=4k --iodepth=16 --direct=1 \\
            --ioengine=libaio --time_based --runtime=2 --size={mib}M --thread > /dev/null 2>&1 &
        torn=$!
        sleep 1
        rebind virtio_blk $second
        wait $torn
    fi
    verify vdb /dev/vdb 4096
    if [ $net = 1 ]; then
        netload send {host} {port} 3 4 > /dev/null || bad "round $round: send"
        if [ $reset = 1 ]; then
            netload recv {host} {port} 3 2 > /dev/null 2>&1 &
            torn=$!
            sleep 1
            rebind virtio_net $card_device
            card
            kill $torn
            wait $torn
        fi
        netload recv {host} {port} 3 4 > /dev/null || bad "round $round: recv"
    fi
    wait $disk
    echo "round=$round"
done
echo "finished=$round"
poweroff -f
"""


class Usage(threading.Thread):
    """Looks every SAMPLE_S at what a process uses, until it is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.samples: list[tuple[int, int, int]] = []  # descriptors, threads, KiB

    def run(self) -> None:
        while True:
            time.sleep(SAMPLE_S)
            try:
                self.samples.append(self._look())
            except OSError:
                return

    def _look(self) -> tuple[int, int, int]:
        at = f"/proc/{self.pid}"
        kib, guest = 0, False
        with open(f"{at}/smaps", encoding="ascii", errors="replace") as smaps:
            for line in smaps:
                first = line.split(maxsplit=1)[0]
                if not first.endswith(":"):
                    guest = "memfd:vmm-ram" in line
                elif first in ("Private_Dirty:", "Private_Clean:") and not guest:
                    kib += int(line.split()[1])
        return len(os.listdir(f"{at}/fd")), len(os.listdir(f"{at}/task")), kib

    def report(self) -> bool:
        """Prints the first and the last quarter's medians; whether nothing grew."""
        quarter = max(1, len(self.samples) // 4)
        flat = bool(self.samples)
        for index, name in enumerate(("descriptors", "threads", "KiB not the guest's")):
            column = [sample[index] for sample in self.samples]
            first = statistics.median(column[:quarter] or [0])
            last = statistics.median(column[-quarter:] or [0])
            print(f"{name}: {first:g} in the first quarter, {last:g} in the last")
            flat = flat and last <= first + (SLACK_KIB if index == 2 else 0)
        return flat


def initramfs(minutes: float, without: list[str], folder: Path) -> str:
    script = SCRIPT.format(
        guest=GUEST, host=HOST, port=PORT, mib=DISK_MIB, seconds=int(minutes * 60),
        net=int("net" not in without), reset=int("reset" not in without),
    )  # fmt: skip
    base = build(script, kernel_tree(), modules=(*VIRTIO_MODULES, "virtio_net"))
    joined = folder / "soak.cpio"
    parts = [p.read_bytes() for p in (base, fio_archive(), archive("netload"))]
    joined.write_bytes(b"".join(part + bytes(-len(part) % 512) for part in parts))
    return str(joined)


def soak(argv: list[str]) -> bool:
    """Whether the guest finished and found nothing, and nothing grew."""
    bad: list[str] = []
    finished = ""
    with subprocess.Popen(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        usage = Usage(process.pid)
        usage.start()
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            print(text, flush=True)
            if "bad=" in text:
                bad.append(text)
            if "finished=" in text:
                finished = text
    usage.join()
    flat = usage.report()
    print(f"{finished or 'the guest did not finish'}; {len(bad)} mismatches; {machine()}")
    return bool(finished) and not bad and flat


def main(argv: list[str]) -> int:
    minutes, without = 60.0, []
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        if flag == "--minutes":
            minutes = float(value)
        elif flag == "--without" and value in ("net", "reset"):
            without.append(value)
        else:
            raise SystemExit(f"bench.soak: unknown argument {flag} {value}")
    kernel = str(fetch("cloud-amd64"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extra = ["-c", "2", "--timeout", f"{int(minutes * 4) + 10}m"]
        for disk in ("a", "b"):
            image = folder / disk
            with open(image, "wb") as file:
                file.truncate(DISK_MIB << 20)
            extra += ["-d", f"{image},queues=2"]
        initrd = initramfs(minutes, without, folder)
        if "net" in without:
            return int(not soak(vmm(*extra)(kernel, initrd)))
        with serving(name):
            return int(not soak(vmm(*extra, "--net", f"tap,ifname={TAP}")(kernel, initrd)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

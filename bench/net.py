"""virtio-net under Linux guests: TCP both ways, one and eight streams, round trips, datagrams.

The same stock kernel and initramfs under vmm and QEMU, on a tap (QEMU's with and without
vhost-net), by user-mode networking (passt here, slirp in QEMU) and over vsock (AF_UNIX here,
vhost-vsock in QEMU), taking turns on one machine. The other end is a process of the host; the
rates are what the receiving side saw.

``python -m bench.net [--rounds N] [--seconds N] [--only NAME]…`` where Linux can be booted;
``python -m bench net …`` there or in an emulated host. Needs root, for the tap.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.boot import ROOT, Argv, machine, qemu, vmm
from guests.fetch import busybox, fetch
from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from guests.tools import archive

TAP, HOST, GUEST = "vmmbench0", "10.97.0.1", "10.97.0.2"
USER_HOST, USER_GUEST = "10.0.2.2", "10.0.2.15"
PORT = 7797
DEADLINE_S = 600
FIGURES = (
    "tx1_mb_s", "tx8_mb_s", "rx1_mb_s", "rx8_mb_s", "rtt_p50_us", "rtt_p99_us", "utx_kpps",
    "urx_kpps",
)  # fmt: skip

CID = 43
ADDRESS = {"tap": (HOST, GUEST), "user": (USER_HOST, USER_GUEST), "vsock": ("vsock", "")}
MODULES = {"tap": "virtio_net", "user": "virtio_net", "vsock": "vmw_vsock_virtio_transport"}

CARD = """\
ip addr add {guest}/24 dev eth0
ip link set eth0 up
"""
STREAMS = """\
netload send {host} {port} {seconds} 1 | sed 's/^tx/tx1/'
netload send {host} {port} {seconds} 8 | sed 's/^tx/tx8/'
netload recv {host} {port} {seconds} 1 | sed 's/^rx/rx1/'
netload recv {host} {port} {seconds} 8 | sed 's/^rx/rx8/'
netload ping {host} {port} 500
"""
DATAGRAMS = """\
netload usend {host} {port} {seconds}
netload urecv {host} {port} {seconds}
"""


def qemu_card(netdev: str) -> Argv:
    card = "virtio-net-pci,netdev=n,disable-legacy=on,romfile="
    return qemu("q35", "-netdev", f"{netdev},id=n", "-device", card)


def contenders(folder: str) -> dict[str, tuple[Argv, str]]:
    """By name: the command, and how it reaches the host."""
    tap = f"tap,ifname={TAP},script=no,downscript=no"
    found = {"vmm tap": (vmm("--net", f"tap,ifname={TAP}"), "tap")}
    have_qemu = shutil.which("qemu-system-x86_64") is not None
    if have_qemu:
        found["qemu tap"] = (qemu_card(f"{tap},vhost=off"), "tap")
        if os.path.exists("/dev/vhost-net"):
            found["qemu tap, vhost"] = (qemu_card(f"{tap},vhost=on"), "tap")
    if shutil.which("passt"):
        found["vmm user"] = (vmm("--net", "user"), "user")
    if have_qemu:
        found["qemu user"] = (qemu_card("user"), "user")
    found["vmm vsock"] = (vmm("--vsock", f"cid={CID},path={folder}/vsock"), "vsock")
    if have_qemu and os.path.exists("/dev/vhost-vsock"):
        device = f"vhost-vsock-pci,guest-cid={CID},disable-legacy=on"
        found["qemu vsock, vhost"] = (qemu("q35", "-device", device), "vsock")
    return found


def initramfs(how: str, seconds: float, folder: str) -> str:
    host, guest = ADDRESS[how]
    script = STREAMS if how == "vsock" else CARD + STREAMS + DATAGRAMS
    script = script.format(host=host, guest=guest, port=PORT, seconds=seconds) + "poweroff -f\n"
    base = build(script, kernel_tree(), modules=(*VIRTIO_MODULES, MODULES[how]))
    joined = Path(folder) / f"{how}.cpio"
    joined.write_bytes(base.read_bytes() + archive("netload").read_bytes())
    return str(joined)


def prepare() -> None:
    """What is built, while files can still be kept."""
    fetch("cloud-amd64")
    with tempfile.TemporaryDirectory() as folder:
        for how in ADDRESS:
            initramfs(how, 1.0, folder)


def tap_up() -> None:
    """The host's end; the VMMs attach to the device by its name."""
    ip = [str(busybox()), "ip"]
    with open("/dev/net/tun", "r+b", buffering=0) as tun:
        # TUNSETIFF: IFF_TAP, IFF_NO_PI and IFF_VNET_HDR; then TUNSETPERSIST.
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", TAP.encode(), 0x5002))
        fcntl.ioctl(tun, 0x400454CB, 1)
    subprocess.run([*ip, "addr", "add", f"{HOST}/24", "dev", TAP], check=False, capture_output=True)
    subprocess.run([*ip, "link", "set", TAP, "up"], check=True)


@contextmanager
def serving(folder: str) -> Iterator[None]:
    """The host's end of the tap and of vsock, with a server behind both."""
    tool = f"{folder}/netload"
    source = ROOT / "guests" / "tools" / "netload.c"
    subprocess.run(["gcc", "-O2", "-o", tool, str(source)], check=True)
    tap_up()
    argv = [tool, "serve", str(PORT), f"{folder}/vsock_{PORT}"]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.kill()
        server.wait()


def measure(argv: list[str], how: str) -> dict[str, float]:
    done = subprocess.run(
        argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S,
        check=False,
    )  # fmt: skip
    text = done.stdout.decode(errors="replace")
    pairs = (line.strip().partition("=") for line in text.splitlines())
    found = {name: float(value) for name, _, value in pairs if name in FIGURES}
    if set(found) != {name for name in FIGURES if how != "vsock" or "kpps" not in name}:
        said = done.stderr.decode(errors="replace")
        raise SystemExit(f"bench: {' '.join(argv)}\nprinted:\n{text}\n{said}")
    return found


def report(figures: dict[str, list[dict[str, float]]]) -> None:
    rounds = len(next(iter(figures.values())))
    print(
        f"\nmedians of {rounds} interleaved rounds (ratio of vmm to it on the same network)\n"
        f"{machine()}"
    )
    print(f"{'':18}" + "".join(f"{name:>20}" for name in FIGURES))
    median = {
        name: {f: statistics.median(run[f] for run in runs) for f in runs[0]}
        for name, runs in figures.items()
    }
    for name, row in median.items():
        how = name.partition(",")[0].split()[1]
        ours = median.get(f"vmm {how}", row)
        cells = (f"{row[f]:.1f} ({ours[f] / row[f]:.2f})" if f in row else "-" for f in FIGURES)
        print(f"{name:18}" + "".join(f"{cell:>20}" for cell in cells))


def main(argv: list[str]) -> int:
    rounds, seconds, only = 3, 3.0, []
    args = iter(argv)
    for arg in args:
        if arg == "--rounds":
            rounds = int(next(args))
        elif arg == "--seconds":
            seconds = float(next(args))
        elif arg == "--only":
            only.append(next(args))
        else:
            raise SystemExit(f"bench.net: unknown argument {arg}")
    kernel = str(fetch("cloud-amd64"))
    with tempfile.TemporaryDirectory() as folder:
        chosen = {n: c for n, c in contenders(folder).items() if not only or n in only}
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
        with serving(folder):
            images = {how: initramfs(how, seconds, folder) for how in ADDRESS}
            for turn in range(rounds):
                for name, (make, how) in chosen.items():
                    figures[name].append(measure(make(kernel, images[how]), how))
                    values = " ".join(f"{k}={v:g}" for k, v in figures[name][-1].items())
                    print(f"round {turn} {name}: {values}", flush=True)
    report(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The parts of plans that every Linux user space needs, whoever carries the machine."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.guest.plan import Plan

_LINKS = (("fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr"))


def overlay(plan: Plan, lower: str, target: str, upper: str) -> None:
    """Mount ``lower`` at ``target`` so that writes go to memory, kept below ``upper``."""
    plan.mount("tmpfs", upper, data="mode=755,size=75%")
    plan.add("mkdir", f"{upper}/top", "755")
    plan.add("mkdir", f"{upper}/work", "755")
    layers = (("lowerdir", lower), ("upperdir", f"{upper}/top"), ("workdir", f"{upper}/work"))
    plan.mount("overlay", target, data=",".join(f"{key}={path}" for key, path in layers))


def kernel_mounts(plan: Plan, top: str) -> None:
    """/proc, /sys, /dev and a new /run below the coming root ``top``."""
    plan.mount("proc", f"{top}/proc", flags="nosuid,nodev,noexec")
    plan.mount("sysfs", f"{top}/sys", flags="nosuid,nodev,noexec")
    plan.mount("devtmpfs", f"{top}/dev", flags="nosuid")
    plan.mount("tmpfs", f"{top}/run", flags="nosuid,nodev", data="mode=755")


def devices(plan: Plan) -> None:
    """What belongs into /dev, in the root that is there now."""
    plan.mount("devpts", "/dev/pts", flags="nosuid,noexec", data="gid=5,mode=620,ptmxmode=666")
    plan.mount("tmpfs", "/dev/shm", flags="nosuid,nodev", data="mode=1777")
    for target, link in _LINKS:
        plan.add("symlink", f"/proc/self/{target}", f"/dev/{link}")

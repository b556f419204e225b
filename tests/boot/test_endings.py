"""How a Linux guest can end, and what is made of it."""

from __future__ import annotations

from tests.boot.conftest import UP, Boot


def test_poweroff(boot: Boot) -> None:
    boot("").ok()


def test_reboot_ends_the_run(boot: Boot) -> None:
    result = boot("reboot -f; sleep 60").result
    assert (result.reason, result.status) == ("reset", 0)


def test_panic(boot: Boot) -> None:
    booted = boot("echo c > /proc/sysrq-trigger")
    assert (booted.result.reason, booted.result.status) == ("panic", 255), booted.report()
    assert "sysrq triggered crash" in booted.console


def test_panic_that_hangs_is_recognised_too(boot: Boot) -> None:
    """With panic=0 the kernel loops for ever; the console still says what happened."""
    booted = boot("echo c > /proc/sysrq-trigger", append="quiet panic=0")
    assert (booted.result.reason, booted.result.status) == ("panic", 255), booted.report()
    assert booted.result.duration_s < 60


def test_hang_and_timeout(boot: Boot) -> None:
    booted = boot("echo spinning; while :; do :; done", timeout=20)
    assert (booted.result.reason, booted.result.status) == ("timeout", 124), booted.report()
    assert UP in booted.console
    assert "rip" in booted.result.diagnosis.lower()


def test_no_init(boot: Boot) -> None:
    booted = boot("", append="quiet rdinit=/nowhere")
    assert booted.result.reason == "panic", booted.report()


def test_missing_root(boot: Boot) -> None:
    booted = boot("", initrds=[], append="quiet root=/dev/vda")
    assert booted.result.reason == "panic", booted.report()
    assert "Unable to mount root" in booted.console

# vmm: what a developer or a new user runs. `make` alone lists the targets.
#
# Every target installs what this machine lacks and says so; a second run does nothing twice.
# Overrides: PYTHON=python3.12 VENV=/path CACHE=/path ARGS="..." (passed to the program run).

SHELL       := /bin/bash
PYTHON      ?= python3
VENV        ?= .venv
BIN         := $(VENV)/bin
PY          := $(BIN)/python
BUILD       := build
ARGS        ?=

# Debian packages: to build, and for the emulated host that offers a /dev/kvm where this one
# cannot boot Linux; the rest makes and checks what tests boot. Kernels come without root
# (guests/fetch.py).
DEBS := gcc make libc6-dev python3-venv python3-dev qemu-system-x86 e2fsprogs mmdebstrap genext2fs \
        fakeroot fakechroot acpica-tools passt

NATIVE_SRC := $(wildcard native/*.c native/*.h native/*.cdef) native/build.py

.DEFAULT_GOAL := help
.PHONY: help setup run shell test test-unit test-nested test-emulated test-boot lint type format asan bench \
        guests wheel clean packages

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- what everything needs ------------------------------------------------------------------

packages:
	@missing=""; \
	for p in $(DEBS); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' \
	  || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; else \
	    echo "vmm: these Debian packages are missing; install them first:"; \
	    echo "  sudo apt-get install --no-install-recommends$$missing"; exit 1; fi; \
	  echo "vmm: installing Debian packages:$$missing"; \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  $$sudo apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

$(BUILD)/venv.stamp: pyproject.toml | packages
	@mkdir -p $(BUILD)
	@echo "vmm: making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -U pip setuptools wheel
	@$(BIN)/pip install -q --disable-pip-version-check $$($(PYTHON) tools/requirements.py)
	@echo 'import os, sys; sys.path.insert(0, "$(CURDIR)")' \
	  > $$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vmm-checkout.pth
	@printf '#!%s\nimport sys\nfrom vmm.__main__ import main\nsys.exit(main())\n' \
	  "$(abspath $(PY))" > $(BIN)/vmm && chmod +x $(BIN)/vmm
	@touch $@

$(BUILD)/native.stamp: $(NATIVE_SRC) $(BUILD)/venv.stamp
	@echo "vmm: building the C core"
	@$(PY) native/build.py >$(BUILD)/native.log 2>&1 || { cat $(BUILD)/native.log; exit 1; }
	@$(PY) -m compileall -q vmm guests tests bench
	@touch $@

setup: $(BUILD)/native.stamp guests ## packages, virtual environment, C core, payload guests

guests: $(BUILD)/native.stamp ## build the payload guests and the guest's init
	@$(MAKE) --no-print-directory -C guests
	@$(PY) -m vmm.guest.initbin

# ---- run ------------------------------------------------------------------------------------

run: setup ## boot Debian's stock cloud kernel and show it working
	@$(PY) -m guests.fetch cloud-amd64 amd64 busybox
	@$(BIN)/vmm run --kernel $$($(PY) -m guests.fetch --print-kernel cloud-amd64) \
	  --initrd $$($(PY) -m guests.initramfs hello) --append quiet --timeout 10m $(ARGS)

shell: setup ## the same kernel with an interactive shell
	@$(PY) -m guests.fetch cloud-amd64 amd64 busybox
	@$(BIN)/vmm run --kernel $$($(PY) -m guests.fetch --print-kernel cloud-amd64) \
	  --initrd $$($(PY) -m guests.initramfs shell) --append quiet $(ARGS)

# ---- check ----------------------------------------------------------------------------------

# The emulated host's own tests mostly wait for it, so they run beside the unit tests.
test: setup ## everything: unit, payload guests on /dev/kvm, the emulated host, Linux boots
	@$(MAKE) --no-print-directory test-emulated >$(BUILD)/emulated.log 2>&1 & beside=$$!; \
	$(MAKE) --no-print-directory test-unit; unit=$$?; \
	wait $$beside; emulated=$$?; cat $(BUILD)/emulated.log; \
	exit $$((unit + emulated))
	@$(MAKE) --no-print-directory test-boot

test-unit: setup ## unit, property and payload tests (the payloads need /dev/kvm)
	@VMM_REQUIRE="$${CI:+payload}" $(PY) -m pytest -q tests --ignore=tests/boot \
	  --ignore=tests/nested $(ARGS)

test-nested: test-emulated test-boot ## the emulated host, and Linux boots inside it

test-emulated: setup ## vmm nested itself
	@$(PY) -m guests.fetch cloud-amd64 amd64 busybox rootfs fio
	@VMM_REQUIRE="$${CI:+nested}" $(PY) -m pytest -q tests/nested $(ARGS)

test-boot: setup ## Linux boots, inside emulated hosts where need be
	@$(PY) -m tests.run_boots $(ARGS)

lint: $(BUILD)/venv.stamp ## ruff, and the C with every warning an error
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@for f in native/*.c guests/init/*.c; do \
	  gcc -std=gnu11 -Wall -Wextra -Werror -O2 -Inative -c -o /dev/null $$f || exit 1; done
	@echo "lint: clean"

type: $(BUILD)/native.stamp ## mypy --strict and pyright
	@$(BIN)/mypy && $(BIN)/pyright --pythonpath $(PY)

format: $(BUILD)/venv.stamp ## let ruff format the Python
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

asan: $(BUILD)/native.stamp ## the tests of the C core under ASan and UBSan
	@tools/asan.sh $(ARGS)

bench: setup ## boot clocks beside QEMU's (ARGS=net, blk, device or latency)
	@$(PY) -m guests.fetch cloud-amd64 amd64 busybox fio
	@$(PY) -m bench $(ARGS)

wheel: $(BUILD)/venv.stamp guests ## sdist and wheel in dist/
	@$(PY) -m build --outdir dist . >$(BUILD)/wheel.log 2>&1 || { tail -30 $(BUILD)/wheel.log; exit 1; }
	@ls dist

clean: ## remove what was built here (not the cache of fetched packages)
	@rm -rf $(BUILD) dist $(VENV) vmm/_native*.so vmm/_native.c native/*.o *.egg-info vmm/data
	@$(MAKE) --no-print-directory -C guests clean
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

#!/usr/bin/env bash
# The tests that drive the C core, under AddressSanitizer and UndefinedBehaviorSanitizer.
# `tools/asan.sh -m MODULE...` runs that instead. Built in a copy below build/, so that the ordinary build stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON_BIN:-.venv/bin/python}")
copy=build/asan
rm -rf "$copy"
mkdir -p "$copy/build"
git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$copy"
[ -d build/guests ] && cp -r build/guests "$copy/build/"
cd "$copy"
echo "asan: building"
VMM_SANITIZE=1 "$python" native/build.py >build/native.log 2>&1 || { cat build/native.log; exit 1; }
if [ "${1:-} ${2:-}" = "-m tests.fuzz" ] && "$python" -c "import mypyc" 2>/dev/null; then
  # What makes the cases and judges them is Python and most of the time; compiled it is half.
  "$python" -m mypyc tests/fuzz/session.py tests/virtio_{ring,mutations}.py \
    vmm/devices/virtio/{queue,split,packed}.py >build/mypyc.log 2>&1 || { cat build/mypyc.log; exit 1; }
fi
tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(tests/unit tests/property tests/payload)
# capstone's loader asks for RTLD_DEEPBIND, which the sanitizers refuse.
echo 'raise ImportError("not under sanitizers")' >capstone.py
# Leaks are for LeakSanitizer in C programs; CPython keeps much on purpose. Guest RAM is mapped
# lazily, so its size must not count.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:halt_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
if [ "${1:-}" = -m ]; then # a program instead of tests: -m tests.fuzz --cases 1000000
  exec "$python" "$@"
fi
# No C runs in these, or (the first two) capstone is what they are about.
without=(unit/test_diagnose payload/test_cli_run unit/test_acpi unit/test_aml unit/test_boot
  unit/test_boot_real unit/test_config unit/test_cpuid unit/test_docs unit/test_doctor unit/test_fdt
  unit/test_msrs unit/test_nested_parts unit/test_oops unit/test_pump unit/test_pytest_plugin
  unit/test_report unit/test_structure unit/test_testing_tap property/test_cli_fuzz
  property/test_values)
ignore=("${without[@]/#/--ignore=tests/}")
exec "$python" -m pytest -q -p no:cacheprovider --timeout=600 \
  "${ignore[@]/%/.py}" "${tests[@]}"

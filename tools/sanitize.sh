#!/usr/bin/env bash
# Runs the tests of the C++ CPU operators under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tools/sanitize.sh [pytest arguments]      PYTHON=... picks the interpreter, CXX=... the compiler
#
# The instrumented extension is built in a temporary folder beside a copy of the package: nothing is installed, and
# the extension in use stays as it is.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
cxx=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
flags=(-O1 -g -std=c++20 -fPIC -fno-omit-frame-pointer -Wall -Wextra -Werror
  -fsanitize=address,undefined -fno-sanitize-recover=all
  -DPy_LIMITED_API=0x030a0000 -DTORCH_TARGET_VERSION=0x020a000000000000
  -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" -isystem "$headers")

cp -r "$root/cascade_fast" "$work/"
find "$work/cascade_fast" -name '*.so' -delete
for source in "$root"/csrc/*.cpp "$root"/csrc/cpu/*.cpp; do
  echo "compiling ${source#"$root"/}"
  "$cxx" "${flags[@]}" -c "$source" -o "$work/$(basename "$source" .cpp).o"
done
"$cxx" -shared -fsanitize=address,undefined "$work"/*.o -o "$work/cascade_fast/_C.abi3.so" \
  -L"$torch/lib" -ltorch -ltorch_cpu -lc10

# Python itself is not instrumented, hence the preload; what it leaks at exit is not ours to judge.
cd "$work" # before the repository on the module path
export LD_PRELOAD="$("$cxx" -print-file-name=libasan.so):$("$cxx" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
export CASCADE_FAST_REQUIRE_EXT=1 PYTHONDONTWRITEBYTECODE=1
cat >"$work/test_which.py" <<'EOF'
import os, cascade_fast.ops, cascade_fast._C

def test_cpp_the_instrumented_extension_is_tested():
    assert cascade_fast._C.__file__.startswith(os.getcwd())
EOF
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -o pythonpath="$work $root $root/tests" \
  "$work/test_which.py" "$root"/tests/test_{ops,adamw8bit,cross_entropy_op,rms_norm_op,layer_ops,attention_ops,low_rank_op}.py \
  --capture=sys -k 'cpp and not inductor' -q "$@" # a report goes past pytest, to the terminal

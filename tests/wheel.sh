#!/usr/bin/env bash
# Test a wheel as a user gets it: the data and retrieval tests in an empty environment, without the sources, and, where
# mounts of our own are possible (root), without compilers, jpeglib.h and the system's libjpeg.
#
#   PYTHON=/usr/bin/python3.12 bash tests/wheel.sh dist/NAME.whl [PYTEST OPTION ...]
set -euo pipefail
wheel=$(realpath "$1")
shift
root=$(realpath "$(dirname "$0")/..")
work=$root/build/wheel-test
python=$work/venv/bin/python

if [ -z "${HIDDEN:-}" ]; then
  rm -rf "$work"
  mkdir -p "$work"
  "$root/.venv/bin/uv" venv --quiet --python "$PYTHON" "$work/venv"
  "$root/.venv/bin/uv" pip install --quiet --python "$python" "$wheel" pytest pytest-xdist hypothesis faiss-cpu
  # The tests without the packages that they test.
  cp -r "$root/tests" "$root/bench" "$root/pyproject.toml" "$root/requirements.txt" "$work"
  if unshare --mount true 2>/dev/null; then
    HIDDEN=yes exec unshare --mount bash "$0" "$wheel" "$@"
  fi
  echo "not hidden: compilers and libjpeg (it needs root)"
fi

# In this process's own view of the file system. A library that is empty cannot be loaded by mistake.
if [ -n "${HIDDEN:-}" ]; then
  hidden=$(for name in cc c++ gcc g++ clang clang++; do command -v "$name" || true; done
    find /usr/include /usr/local/include -name jpeglib.h
    find /usr/lib /lib /usr/local/lib -name 'libjpeg.so*' -o -name 'libturbojpeg.so*' -o -name 'libjpeg.a')
  for path in $hidden; do
    mount --bind /dev/null "$(realpath "$path")"
  done
  if cc --version 2>/dev/null || c++ --version 2>/dev/null; then
    echo "a compiler still runs"
    exit 1
  fi
  echo "hidden: $(echo "$hidden" | wc -w) files"
fi

cd "$work"
"$python" - <<'END'
import re
from pathlib import Path
from matryoshka.data import _native as images
from matryoshka.retrieval import _native as search

loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
mapped = sorted(path for path in loaded if re.search(r"/libjpeg[-.0-9a-f]*so", path))
print("native modules:", images.__file__, search.__file__)
print("libjpeg:", *mapped)
assert "site-packages" in images.__file__, "the wheel is not what is imported"
assert any("matryoshka_vision.libs" in path for path in mapped), "not the wheel's libjpeg"
assert not any(path.startswith(("/usr", "/lib")) for path in mapped), "the system's libjpeg"
END
# All but the tests that read or compile the sources.
sources=(--ignore=tests/retrieval/test_cross.py
  --deselect=tests/data/test_sources.py::test_the_program
  --deselect=tests/data/test_sources.py::test_the_shell_script
  --deselect=tests/retrieval/test_sweep_outlook.py::test_the_documented_numbers)
OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider -m "not slow" -n "${PYTEST_WORKERS:-2}" --dist worksteal \
  "${sources[@]}" "$@" tests/data tests/retrieval

#!/usr/bin/env bash
# Measurements and tests for a machine with an NVIDIA GPU and no network, in two parts of a few minutes each.
#
#   bash bench/gpu.sh prepare     on a machine with a network: makes $SHIP/A and $SHIP/B, what the parts need there
#   bash bench/gpu.sh A           540 s: info setup tests train eager blurpool compiled graphs data profile retrieval
#   bash bench/gpu.sh B           230 s: info setup mrl ff512 ff16 mrl_e cifar ssl
#   bash bench/gpu.sh STEP ...    some steps; also heads (head and loss alone) and suite (all tests)
#
# A failed step does not stop the others. Every measurement is a line of $OUT as soon as it is made, and names its
# commit: what was measured remains when this script or the machine is stopped. On a machine without a GPU the steps
# are skipped. To keep rows, append $OUT/*.jsonl to those in bench/results/ and run `make docs`.
#
# PYTHON   a python3, on the machine with the GPU with torch and torchvision; the environment that is made, in
#          $WORK/venv, uses its packages. prepare takes it to build the wheel: from 3.12 on, it fits all later versions
# SHIP     the folder of prepare (build/gpu/ship), or one of its parts: wheels/, data/ and the file `commit`
# DATA_A, DATA_B   of prepare: archives for each part, several with spaces between. A: Tiny-ImageNet, a folder with
#          train/ and val/, and photos in class folders. B: Tiny-ImageNet and CIFAR-10, with train/ and test/
# TARGET   3.12: of prepare, the Python of the machine with the GPU
# COMMIT   of the rows; default: $SHIP/commit, or git's
# WORK     build/gpu: environment and data. FAST: /dev/shm: run folders
# OUT      $WORK/results: summary.txt, log.txt, runs.tar, and the rows
# LIMIT    540 for A, 230 for B, else 1700: seconds for all steps; what would not end before is not begun
# EPOCHS   40: of the runs on Tiny-ImageNet in part B. SSL_EPOCHS: 12. METHODS: sigreg
# SMOKE=1  tiny arguments, with or without a GPU, to test this script
#
# Exit status: 1 if a step failed. Skipped steps are listed and do not count as failures.
set -uo pipefail
for path in SHIP WORK OUT; do # relative to the caller's folder
  [ -z "${!path:-}" ] || export "$path=$(realpath -m "${!path}")"
done
case ${PYTHON:-} in */*) PYTHON=$(realpath -ms "$PYTHON") ;; esac
caller=$PWD
cd "$(dirname "$0")/.." || exit 2
root=$PWD

python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}"; exit 2; }
smoke=${SMOKE:-}
work=${WORK:-$root/build/gpu}
out=${OUT:-$work/results}
failed=0
TRAVELS=$((64 * 1024 * 1024)) # bytes that a part and the project may have together

# ---- what a machine without a network needs ----

prepare() {
  local ship=${SHIP:-$work/ship} part archive data project
  rm -rf "$ship" && mkdir -p "$ship/wheels" || return 1
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))'; then
    make --no-print-directory wheel PYTHON="$python" || return 1
    cp "$(ls -t dist/*.whl | head -n 1)" "$ship/wheels"
  else # the stable ABI begins with 3.12: built there, from the sources
    echo "note: $("$python" --version) makes no wheel for others: the sources are built on the machine with the GPU"
    fetch scikit-build-core nanobind pathspec packaging || return 1
    (cd "$ship/wheels" && apt-get download libjpeg62-turbo-dev libjpeg62-turbo) || return 1
  fi
  fetch fastargs terminaltables pyyaml xxhash || return 1
  state >"$ship/commit"
  project=$(git ls-files -z | xargs -0 du --apparent-size -cb | tail -n 1 | cut -f 1)
  for part in A B; do
    mkdir -p "$ship/$part/data"
    cp -r "$ship/wheels" "$ship/commit" "$ship/$part"
    data=DATA_$part
    for archive in ${!data:-}; do
      cp "$(cd "$caller" && realpath "$archive")" "$ship/$part/data" || return 1
    done
    size "$ship/$part" "$project" || return 1
  done
  rm -r "$ship/wheels" "$ship/commit"
}

# Wheels for the target's Python, of the versions in requirements.txt: ready ones, or built here from pure Python
fetch() {
  local name version=${TARGET:-3.12} pip=(.venv/bin/python -m pip --disable-pip-version-check -q)
  for name in "$@"; do
    name=$(grep "^$name==" requirements.txt || echo "$name")
    "${pip[@]}" download --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
      -d "$ship/wheels" "$name" 2>/dev/null || "${pip[@]}" wheel --no-deps -w "$ship/wheels" "$name" || return 1
  done
}

state() { # the commit, with -dirty behind it for changed files
  echo "$(git rev-parse HEAD)$([ -z "$(git status --porcelain)" ] || echo -dirty)"
}

size() { # PART PROJECT: prints the size of a part; fails above the limit
  local bytes all
  bytes=$(du --apparent-size -sb "$1" | cut -f 1)
  all=$((bytes + $2))
  printf '%s: %.1f MiB, with the project %.1f of %d MiB\n' "$1" "$(mib "$bytes")" "$(mib "$all")" $((TRAVELS / 1048576))
  [ "$all" -le "$TRAVELS" ] || { echo "$1: larger than what may travel; leave out an archive"; return 1; }
}

mib() { awk "BEGIN { print $1 / 1048576 }"; }

if [ "${1:-}" = prepare ]; then
  prepare
  exit
fi

# ---- the two parts ----

part_a="info setup tests train eager blurpool compiled graphs data profile retrieval"
part_b="info setup mrl ff512 ff16 mrl_e cifar ssl"
case ${1:-A} in
A) steps=$part_a limit=${LIMIT:-540} ship=${SHIP:-$work/ship}/A ;;
B) steps=$part_b limit=${LIMIT:-230} ship=${SHIP:-$work/ship}/B ;;
*) steps=$* limit=${LIMIT:-1700} ship=${SHIP:-$work/ship} ;;
esac
[ -d "${SHIP:-}/wheels" ] && ship=$SHIP # SHIP may be one of the parts itself
deadline=$((SECONDS + limit))
data=$work/data
fast=${FAST:-/dev/shm}
[ -w "$fast" ] || fast=$work
runs=$fast/matryoshka-gpu-$(id -u)
py=$work/venv/bin/python
matryoshka="$py -P -m matryoshka" # -P: what is installed, not the sources in this folder
export PYTHONUNBUFFERED=1
export BENCH_RESULTS=$out
MATRYOSHKA_COMMIT=${COMMIT:-$(cat "$ship/commit" 2>/dev/null || state 2>/dev/null)}
export MATRYOSHKA_COMMIT
mkdir -p "$work" "$out" "$runs" || exit 2
: >>"$out/log.txt"
: >>"$out/summary.txt"

note() { # STEP RESULT
  printf '%-10s %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

# run STEP NEEDS SECONDS COMMAND...: within its own and the total limit, if the seconds that it needs are left. The
# output also goes to log.txt.
run() {
  local step=$1 needs=$2 most=$3 left=$((deadline - SECONDS)) start=$SECONDS status
  shift 3
  [ -z "$smoke" ] || most=$((10 * most)) # a slow machine is no failure of the script
  if [ "$left" -lt "$needs" ]; then
    note "$step" "skipped: $left s are left"
    return 1
  fi
  echo "== $step: $*" | tee -a "$out/log.txt"
  timeout --kill-after=5 $((most < left ? most : left)) "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  took=$((SECONDS - start))
  case $status in
  0) note "$step" "ok, $took s" && return 0 ;;
  124 | 137) note "$step" "FAILED: stopped after $took s" ;;
  *) note "$step" "FAILED: status $status after $took s" ;;
  esac
  failed=1
  return 1
}

info() {
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  echo "commit ${MATRYOSHKA_COMMIT:-unknown}, $(nproc --all) cores, $("$python" --version)"
  "$python" - <<'END'
import torch, torchvision
print("torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
END
}

# ---- environment and data ----

# An environment that uses the packages of $python and has its own for everything installed here.
setup() {
  local site missing archive name
  [ -x "$py" ] || "$python" -m venv --without-pip "$work/venv" || return 1
  site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" - >"$site/outer.pth" <<'END'
import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")
END
  if ls "$ship"/wheels/matryoshka_vision-*.whl >/dev/null 2>&1; then
    missing=$(lacking "$ship"/wheels/*.whl) || return 1
    # shellcheck disable=SC2086  # a list of files
    install $missing || return 1
  elif ! "$py" -P -c 'from matryoshka.data import _native' 2>/dev/null; then
    from_sources || return 1
  fi
  "$py" -P -c 'from matryoshka.data import _native; print("native core:", _native.__file__)' || return 1
  mkdir -p "$data"
  for archive in "$ship"/data/*.tar*; do
    name=$data/.$(basename "$archive")
    [ -e "$archive" ] && [ ! -e "$name" ] || continue
    # Several at a time; a mark for each that is whole.
    (tar xf "$archive" -C "$data" --no-same-owner && touch "$name") &
  done
  wait
  for archive in "$ship"/data/*.tar*; do
    [ ! -e "$archive" ] || [ -e "$data/.$(basename "$archive")" ] || { echo "$archive: not unpacked"; return 1; }
  done
}

# lacking WHEEL...: those of matryoshka, and of packages that are not there
lacking() {
  "$py" - "$@" <<'END'
import sys
from importlib import metadata
from pathlib import Path
for wheel in sys.argv[1:]:
    name = Path(wheel).name.split("-")[0]
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        print(wheel)
    else:
        if name == "matryoshka_vision":
            print(wheel)
END
}

install() {
  "$python" -m pip --python "$py" install --no-deps --no-index --force-reinstall --disable-pip-version-check \
    --find-links "$ship/wheels" "$@"
}

# The native core, for a Python without a wheel: scikit-build-core, nanobind and libjpeg are among the wheels.
from_sources() {
  local missing
  missing=$(lacking "$ship"/wheels/*.whl) || return 1
  # shellcheck disable=SC2086  # a list of files
  [ -z "$missing" ] || install $missing || return 1
  unpack_jpeg
  if ! header && ! sh system-deps.sh native; then return 1; fi
  "$python" -m pip --python "$py" install --no-deps --no-build-isolation --no-index --disable-pip-version-check \
    --config-settings=build-dir=build/gpu/{wheel_tag} .
}

header() {
  printf '#include <cstdio>\n#include <jpeglib.h>\n' | ${CXX:-c++} -x c++ -fsyntax-only - 2>/dev/null
}

# jpeglib.h and its library from Debian packages, linked by their path: this script only
unpack_jpeg() {
  local deb lib
  header && return
  for deb in "$ship"/wheels/*jpeg*.deb; do
    [ -e "$deb" ] && dpkg-deb -x "$deb" "$work/jpeg"
  done
  [ -d "$work/jpeg/usr" ] || return
  lib=$(dirname "$(find "$work/jpeg/usr/lib" -name 'libjpeg.so*' | head -n 1)")
  CPATH=$(dirname "$(find "$work/jpeg/usr/include" -name jconfig.h | head -n 1)"):$work/jpeg/usr/include
  export CMAKE_PREFIX_PATH=$work/jpeg/usr CPATH LIBRARY_PATH=$lib LDFLAGS="-Wl,-rpath,$lib"
}

# digits, where an archive did not come: NAME with train.beton and val.beton
digits() {
  local part
  for part in train val; do
    [ -e "$data/digits/$part.beton" ] || $matryoshka write --cfg.dataset=digits --cfg.split=$part \
      --cfg.write_path="$data/digits/$part.beton" ${smoke:+--cfg.subset=200} >&2 || return 1
  done
}

# sets: data.train_dataset and data.val_dataset of Tiny-ImageNet, or of digits
sets() {
  local set=$data/tiny-imagenet-100
  if [ -d "$set" ]; then
    echo "--data.train_dataset=$set/train --data.val_dataset=$set/val"
  else
    digits && echo "--data.train_dataset=$data/digits/train.beton --data.val_dataset=$data/digits/val.beton"
  fi
}

cifar_set() {
  if [ -d "$data/cifar10-jpeg" ]; then
    echo "$data/cifar10-jpeg"
  else
    digits && echo "$data/digits/train.beton,$data/digits/val.beton"
  fi
}

described() { # what the images of `sets` are
  local set=$data/tiny-imagenet-100
  if [ -d "$set" ]; then
    echo "Tiny-ImageNet, $(ls "$set/train" | wc -l) classes"
  else
    echo digits
  fi
}

keep() { # RUN NAME: the small files of a run folder, in runs.tar
  local kept=() file
  for file in params.json config.yaml env.json log results.json; do
    [ ! -e "$1/$file" ] || kept+=("$file")
  done
  tar rf "$out/runs.tar" -C "$1" --transform "s,^,$2/," "${kept[@]}"
}

# ---- training ----

# A ResNet-18 at 64 px: stopped after its first epochs with SIGTERM, then resumed to three
train() {
  local options log=$runs/train/run/log process
  rm -rf "$runs/train"
  options="$(sets) --config-file=rn18_configs/rn18_16_epochs.yaml --model.mrl=1 --training.compile=0
    --training.epochs=3 --resolution.min_res=64 --resolution.max_res=64 --validation.resolution=64
    --training.batch_size=${TRAIN_BATCH:-256} --logging.folder=$runs/train --logging.run_id=run ${TRAIN_TINY:-}" || return 1
  # shellcheck disable=SC2086  # a list of options
  $matryoshka train $options &
  process=$!
  until [ "$(cat "$log" 2>/dev/null | wc -l)" -ge 2 ] || ! kill -0 $process 2>/dev/null; do sleep 0.1; done
  kill -TERM $process 2>/dev/null
  wait $process
  echo "stopped with status $? after $(wc -l <"$log") epochs"
  # shellcheck disable=SC2086
  $matryoshka train $options --training.resume=auto || return 1
  [ "$(wc -l <"$log")" -eq 3 ] || { echo "$log: not 3 epochs"; return 1; }
  keep "$runs/train/run" train
  "$py" bench/accuracy.py "$runs/train/run" --data "$(described)" --record
}

# nested NAME OPTION...: a ResNet-18 on Tiny-ImageNet, decoded once and kept on the device
nested() {
  local name=$1 options
  shift
  rm -rf "${runs:?}/$name"
  options="$(sets) --config-file=rn18_configs/rn18_16_epochs.yaml --training.compile=0 --data.resident=1
    --training.epochs=${EPOCHS:-40} --training.batch_size=512 --training.weight_decay=0.0005
    --training.label_smoothing=0.1 --resolution.min_res=64 --resolution.max_res=128 --validation.resolution=128
    --resolution.start_ramp=$((${EPOCHS:-40} / 2)) --resolution.end_ramp=$((${EPOCHS:-40} * 3 / 4))
    --logging.folder=$runs/$name --logging.run_id=run ${NESTED_TINY:-}" || return 1
  # shellcheck disable=SC2086  # a list of options
  $matryoshka train $options "$@" || return 1
  keep "$runs/$name/run" "$name"
  "$py" bench/accuracy.py "$runs/$name/run" --data "$(described)" --record
}

cifar() {
  local set
  set=$(cifar_set) || return 1
  rm -rf "$runs/cifar"
  # shellcheck disable=SC2086  # a list of options
  $matryoshka cifar --config-file vit_configs/fast_cnn.yaml --data "$set" --nowandb --logging.folder="$runs/cifar" \
    --logging.run_id=run --cifar.seed_outputs=0 ${CIFAR_TINY:-} || return 1
  keep "$runs/cifar/run" cifar
  "$py" bench/small_images.py "$runs/cifar/run" --recipe fast_cnn.yaml --data "$(cifar_described)" --record
}

cifar_described() { [ -d "$data/cifar10-jpeg" ] && echo "CIFAR-10, JPEG copy" || echo digits; }

# A run that the limit stops resumes in the next call on the same machine.
ssl() {
  local method both="--data.train_dataset=$data/cifar10-jpeg/train --data.val_dataset=$data/cifar10-jpeg/test"
  if [ ! -d "$data/cifar10-jpeg" ]; then
    digits || return 1
    both="--data.train_dataset=$data/digits/train.beton --data.val_dataset=$data/digits/val.beton"
  fi
  for method in ${METHODS:-sigreg}; do
    # shellcheck disable=SC2086  # a list of options
    $matryoshka ssl --config-file "ssl_configs/${method}_resnet18_cifar10.yaml" $both --epochs "${SSL_EPOCHS:-12}" \
      --logging.folder="$runs/ssl" --logging.run_id="$method" --training.resume=auto ${SSL_TINY:-} || return 1
    keep "$runs/ssl/$method" "ssl-$method"
    "$py" bench/ssl_runs.py "$runs/ssl/$method" --recipe "${method}_resnet18_cifar10.yaml, ${SSL_EPOCHS:-12} epochs" \
      --data "$(cifar_described)" --record || return 1
  done
}

export -f info setup lacking install from_sources header unpack_jpeg digits sets cifar_set described keep train nested
export -f cifar cifar_described ssl
export python py matryoshka ship work out data runs smoke
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null || echo 0)

# ---- arguments of the measurements ----

photos=()
[ ! -d "$data/imagenet-samples" ] || photos=(--photos "$data/imagenet-samples")
if [ "$smoke" ]; then
  tiny=(--blocks 2 --seconds 0 --classes 10 --cases resnet10:32:4 --widths)
  heads=(--arch --widths 16 --head-batch 3 --blocks 1 --seconds 0 --classes 10)
  eager=("${tiny[@]}" --modes eager) blurpool=("${tiny[@]}" --modes eager --blurpool 1 --kinds FF MRL)
  compiled=("${tiny[@]}" --modes eager --kinds FF MRL) graphs=("${tiny[@]}" --modes eager --kinds MRL)
  fed=(--arch resnet10 --images 32 --batch 4 --res 32 --steps 2 --blocks 2 --classes 10)
  search=(--device cpu --rows 3000 --queries 50 --turns 1)
  profiled=(--cases resnet10:32:4 --modes eager --classes 10)
  export EPOCHS=1 SSL_EPOCHS=1 TRAIN_BATCH=32 TRAIN_TINY="--model.arch=resnet10 --data.num_workers=1
    --resolution.min_res=32 --resolution.max_res=32 --validation.resolution=32"
  export NESTED_TINY="--model.arch=resnet10 --resolution.min_res=32 --resolution.max_res=32 --validation.resolution=32
    --training.batch_size=100"
  export CIFAR_TINY="--training.epochs=1" SSL_TINY="--views.size=16 --training.batch_size=64 --model.arch=resnet10
    --ssl.hidden=64 --model.arch_options="
else
  turns=(--blocks 3 --seconds 0.3 --widths)
  heads=(--arch)
  eager=("${turns[@]}" --modes eager --cases rn50:224:256 rn18:64:1024 rn50:160:512 --limit 60
    --kinds FF MRL MRL-E "official MRL")
  blurpool=("${turns[@]}" --modes eager --blurpool 1 --cases rn50:224:256 rn18:64:1024 --kinds FF MRL --limit 30)
  compiled=("${turns[@]}" --modes compiled --cases rn50:224:256 --blurpool 0 1 --kinds FF MRL --limit 75)
  graphs=("${turns[@]}" --modes graphs eager compiled --cases rn18:64:512 --kinds MRL --limit 45)
  fed=(--threads 8 0 --blocks 3 "${photos[@]}")
  search=(--queries 20000)
  profiled=(--cases rn50:224:256 --modes eager)
fi

ready=
[ ! -x "$py" ] || ready=1
took=10
longest=5
for step in $steps; do
  if [ "$gpu" = 0 ] && [ -z "$smoke" ] && [ "$step" != info ]; then
    note "$step" "skipped: torch sees no GPU"
    continue
  fi
  case $step in
  info | setup) ;;
  *) if [ -z "$ready" ]; then
    note "$step" "skipped: setup has not succeeded"
    continue
  fi ;;
  esac
  case $step in
  info) run info 5 30 bash -c info ;;
  setup) if run setup 10 150 bash -c setup; then ready=1; else ready=; fi ;;
  tests) run tests 20 60 "$py" -P -m pytest -q -p no:cacheprovider -k "cuda or (gpu and not cpu)" \
    $(ls tests/test_gpu.py 2>/dev/null) tests/data/test_loader.py tests/data/test_slots.py tests/retrieval/test_device_search.py ;;
  train) run train 20 75 bash -c train ;;
  heads) run heads 20 120 "$py" bench/step.py "${heads[@]}" ;;
  eager) run eager 20 100 "$py" bench/step.py "${eager[@]}" ;;
  blurpool) run blurpool 20 60 "$py" bench/step.py "${blurpool[@]}" ;;
  compiled) run compiled 60 170 "$py" bench/step.py "${compiled[@]}" ;;
  graphs) run graphs 40 90 "$py" bench/step.py "${graphs[@]}" ;;
  data) run data 30 75 "$py" bench/end_to_end.py "${fed[@]}" ;;
  profile) run profile 15 30 "$py" bench/step.py --profile "${profiled[@]}" ;;
  retrieval) run retrieval 30 100 "$py" bench/retrieval_device.py "${search[@]}" ;;
  # A run that is stopped says nothing: the next one needs as long as the longest so far.
  mrl) run mrl 10 120 bash -c 'nested mrl --model.mrl=1' && longest=$((took + 2)) ;;
  ff512) run ff512 "$longest" 120 bash -c 'nested ff512 --model.fixed_feature=512' ;;
  ff16) run ff16 "$longest" 120 bash -c 'nested ff16 --model.fixed_feature=16' ;;
  mrl_e) run mrl_e "$longest" 120 bash -c 'nested mrl_e --model.efficient=1' ;;
  cifar) run cifar 25 90 bash -c cifar ;;
  ssl) run ssl 40 240 bash -c ssl ;;
  suite) run suite 60 600 "$py" -P -m pytest -q -p no:cacheprovider ${smoke:+-k nested} tests ;;
  *) note "$step" "skipped: there is no such step" ;;
  esac
done
echo "== results in $out"
cat "$out/summary.txt"
exit $failed

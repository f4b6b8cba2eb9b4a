#!/usr/bin/env bash
# Measurements and tests for a machine with an NVIDIA GPU, in steps. A failed step does not stop the others.
#
#   bash bench/gpu.sh [STEP ...]        default: info build tests heads eager data retrieval compiled train small unlabelled profile suite
#
# PYTHON   a python3 with torch and torchvision; the build goes to build/gpu/venv, which uses its packages
# WHEELS   for machines without a network: a folder with the *.whl that pyproject.toml requires and python lacks and,
#          if jpeglib.h is missing, the *.deb of it. Make it on a machine with a network; for Python 3.12 and Debian:
#            pip wheel --no-deps -w wheels scikit-build-core nanobind pathspec fastargs terminaltables
#            (cd wheels && apt-get download libjpeg62-turbo-dev libjpeg62-turbo)
# DATA     a folder with train* and val*: .beton, .ffcv or image folders. Default: digits, and crops of two photos
# CIFAR    for the steps small and unlabelled: a folder with train/ and test/ of CIFAR-10. Default: digits
# OUT      build/gpu/results: summary.txt, log.txt, profile.txt, train.log, step.jsonl, end_to_end.jsonl,
#          retrieval_device.jsonl
# LIMIT    1700: seconds for all steps; steps that would begin later are skipped. If a call may take 10 minutes:
#            LIMIT=580 bash bench/gpu.sh info build heads eager      and then, on the same machine,
#            LIMIT=580 bash bench/gpu.sh tests data compiled         and    train profile suite
# SMOKE=1  tiny arguments, with or without a GPU, to test this script
#
# Exit status: 1 if a step failed. Skipped steps are listed and do not count as failures.
set -uo pipefail
for path in WHEELS DATA OUT; do # relative to the caller's folder
  [ -z "${!path:-}" ] || export "$path=$(realpath -m "${!path}")"
done
case ${PYTHON:-} in */*) PYTHON=$(realpath -ms "$PYTHON") ;; esac
cd "$(dirname "$0")/.." || exit 2

python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}"; exit 2; }
smoke=${SMOKE:-}
work=$PWD/build/gpu
out=${OUT:-$work/results}
wheels=${WHEELS:-}
deadline=$((SECONDS + ${LIMIT:-1700}))
steps=${*:-info build tests heads eager data retrieval compiled train small unlabelled profile suite}
failed=0
export PYTHONUNBUFFERED=1
mkdir -p "$work" "$out" || exit 2
: >"$out/log.txt"
: >"$out/summary.txt"

note() { # STEP RESULT
  printf '%-10s %s\n' "$1" "$2" | tee -a "$out/summary.txt"
}

# run STEP SECONDS COMMAND...: within its own and the total time limit; the output also goes to log.txt
run() {
  local step=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status
  shift 2
  if [ "$left" -lt 10 ]; then
    note "$step" "skipped: no time left"
    return 1
  fi
  echo "== $step: $*" | tee -a "$out/log.txt"
  timeout --kill-after=10 $((limit < left ? limit : left)) "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  case $status in
  0) note "$step" "ok, $((SECONDS - start)) s" && return 0 ;;
  124 | 137) note "$step" "FAILED: stopped after $((SECONDS - start)) s" ;;
  *) note "$step" "FAILED: status $status after $((SECONDS - start)) s" ;;
  esac
  failed=1
  return 1
}

info() {
  nvidia-smi 2>/dev/null || echo "no nvidia-smi"
  echo "commit $(git rev-parse HEAD 2>/dev/null || echo "${COMMIT:-unknown}"), $(nproc --all) cores, $("$python" --version)"
  "$python" - <<'EOF'
import torch, torchvision
print("torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
EOF
}

# An environment that uses the packages of $python and has its own for everything installed here.
build() {
  local site missing
  [ -x "$py" ] || "$python" -m venv --without-pip "$work/venv" || return 1
  site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >"$site/outer.pth"
  missing=$("$py" - <<'EOF'
import sys, tomllib
from importlib import metadata
try:
    from packaging.requirements import Requirement
except ImportError:  # pip's own
    from pip._vendor.packaging.requirements import Requirement
about = tomllib.load(open("pyproject.toml", "rb"))
wanted = about["build-system"]["requires"] + about["project"]["dependencies"] + ["pytest", "hypothesis", "pathspec"]
for requirement in map(Requirement, wanted):
    try:
        if requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
            continue
    except metadata.PackageNotFoundError:
        pass
    print(requirement.name)
EOF
  ) || return 1
  echo "missing: ${missing:-nothing}"
  # shellcheck disable=SC2086  # a list of names
  [ -z "$missing" ] || install $missing || return 1
  if ! header && ! sh system-deps.sh native; then return 1; fi
  install --no-build-isolation --config-settings=build-dir=build/gpu/{wheel_tag} -e . || return 1
  "$py" -c 'from matryoshka.data import _native; print("native core:", _native.__file__)'
}

install() {
  "$python" -m pip --python "$py" install --no-deps --disable-pip-version-check ${wheels:+--no-index --find-links "$wheels"} "$@"
}

header() {
  printf '#include <cstdio>\n#include <jpeglib.h>\n' | ${CXX:-c++} -x c++ -fsyntax-only - 2>/dev/null
}

# jpeglib.h and its library from Debian packages, for this script only
unpack_jpeg() {
  local deb lib
  header && return
  for deb in ${wheels:+"$wheels"/*jpeg*.deb}; do
    [ -e "$deb" ] && dpkg-deb -x "$deb" "$work/jpeg"
  done
  [ -d "$work/jpeg/usr" ] || return
  lib=$(dirname "$(find "$work/jpeg/usr/lib" -name 'libjpeg.so*' | head -n 1)")
  export CMAKE_PREFIX_PATH=$work/jpeg/usr LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  CPATH=$(dirname "$(find "$work/jpeg/usr/include" -name jconfig.h | head -n 1)"):$work/jpeg/usr/include
  LIBRARY_PATH=$lib
  export CPATH LIBRARY_PATH
}

# one NAME: the first file or folder of DATA with this name; nothing without DATA
one() {
  local found
  for found in ${DATA:+"$DATA"/"$1"*.beton "$DATA"/"$1"*.ffcv "$DATA"/"$1"}; do
    [ -e "$found" ] && echo "$found" && return
  done
}

# Training options; TRAIN_ARGS replaces all of them
train() {
  local train val options
  train=$(one train) val=$(one val)
  if [ -z "$train" ] || [ -z "$val" ]; then
    rm -rf "$work/demo"
    "$work/venv/bin/matryoshka" demo "$work/demo"
    return
  fi
  options=${TRAIN_ARGS:---config-file rn18_configs/rn18_16_epochs.yaml --training.epochs=2 --training.batch_size=256}
  # shellcheck disable=SC2086  # a list of options
  "$work/venv/bin/matryoshka" train $options --model.mrl=1 --data.train_dataset="$train" --data.val_dataset="$val" \
    --logging.folder="$work/trainlogs" || return 1
  cp "$(ls -td "$work"/trainlogs/*/log | head -n 1)" "$out/train.log"
}

# Small nets on CIFAR-10, plain and nested, with their results in $out/small/
small() {
  local data name
  data=$(small_data) || return 1
  local sgd="--opt sgd --training.momentum=0.9 --training.nesterov=1 --weight_decay 0.0005 --noaug --lr 0.2 --bs 512
    --lr.lr_schedule_type=cyclic --lr.lr_peak_epoch=5 --training.label_smoothing=0.1 --data.random_erasing=0.5"
  local adamw="--opt adamw --weight_decay 0.06 --lr 0.001 --bs 512 --lr.warmup_epochs=3 --data.cutmix=1"
  # shellcheck disable=SC2086  # lists of options
  one_net fast_cnn --config-file vit_configs/fast_cnn.yaml ${EPOCHS:+--training.epochs="$EPOCHS"} && one_net res18 --net res18 $sgd --n_epochs "${EPOCHS:-30}" &&
    one_net res18_mrl --net res18 --mrl_flag $sgd --n_epochs "${EPOCHS:-30}" &&
    one_net cct_mrl --net cct --mrl_flag $adamw --n_epochs "${EPOCHS:-20}"
}

# The folder of small images; digits are written where there is no other.
small_data() {
  local part
  [ -z "${CIFAR:-}" ] || { echo "$CIFAR" && return; }
  for part in train val; do
    "$work/venv/bin/matryoshka" write --cfg.dataset=digits --cfg.split=$part --cfg.write_path="$work/digits/$part.beton" \
      >&2 || return 1
  done
  echo "$work/digits"
}

# Self-supervised methods on CIFAR-10; METHODS and SSL_EPOCHS choose. A run that the time limit stops resumes in the
# next call on the same machine. Results in $out/unlabelled/
unlabelled() {
  local data method run tiny
  data=$(small_data) || return 1
  for method in ${METHODS:-sigreg relic moco}; do
    run=$work/unlabelled/$method
    tiny=${EPOCHS:+--views.size=16 --training.batch_size=64}
    [ "$method" != moco ] || tiny+=${EPOCHS:+ --ssl.queue=256}
    # shellcheck disable=SC2086  # a list of options
    "$work/venv/bin/matryoshka" ssl --config-file "ssl_configs/${method}_resnet18_cifar10.yaml" --data "$data" $tiny \
      --epochs "${EPOCHS:-${SSL_EPOCHS:-12}}" --logging.folder="$work/unlabelled" --logging.run_id="$method" \
      --training.resume=auto || return 1
    mkdir -p "$out/unlabelled/$method"
    cp "$run/results.json" "$run/log" "$run/env.json" "$out/unlabelled/$method/"
  done
}

one_net() {
  local name=$1 run
  shift
  rm -rf "$work/small/$name"
  "$work/venv/bin/matryoshka" cifar --data "$data" --nowandb "$@" --logging.folder="$work/small/$name" \
    --cifar.seed_outputs=0 || return 1
  run=$(ls -td "$work/small/$name"/* | head -n 1)
  mkdir -p "$out/small/$name"
  cp "$run/results.json" "$run/log" "$run/env.json" "$out/small/$name/"
}

# fresh NAME: the rows that this run added to bench/results/
fresh() {
  local file=bench/results/$1.jsonl
  [ -e "$file" ] && tail -n +"$(($2 + 1))" "$file" >"$out/$1.jsonl"
}

lines() { [ -e "bench/results/$1.jsonl" ] && wc -l <"bench/results/$1.jsonl" || echo 0; }

profile() {
  set -o pipefail
  "$py" bench/step.py --profile "$@" | tee "$out/profile.txt"
}

py=$work/venv/bin/python
unpack_jpeg
step_rows=$(lines step) data_rows=$(lines end_to_end) search_rows=$(lines retrieval_device)
export -f info build install header one train small small_data one_net unlabelled profile
export python py wheels work out
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null || echo 0)
if [ "$smoke" ]; then
  tiny=(--no-record --blocks 1 --seconds 0 --classes 10 --batch 4 --res 32)
  heads=(--arch --widths 16 "${tiny[@]}") eager=(--widths --arch resnet10 --modes eager "${tiny[@]}")
  compiled=(--widths --arch resnet10 --modes compiled --kinds FF MRL "${tiny[@]}")
  data=(--no-record --arch resnet10 --images 32 --batch 4 --res 32 --steps 2 --blocks 1 --classes 10)
  search=(--no-record --device cpu --rows 3000 --queries 50 --turns 1)
  profiled=(--arch resnet10 --modes eager --batch 4 --res 32 --classes 10)
  export EPOCHS=1
else
  heads=(--arch)
  eager=(--widths --modes eager --kinds FF MRL MRL-E "official MRL" --seconds 0.3 --limit 280)
  compiled=(--widths --modes compiled --res 224 --batch 256 --kinds FF MRL MRL-E "official MRL" --limit 200)
  file=$(one train)
  data=(--threads 4 8 0 ${file:+--data "$file"})
  search=()
  profiled=(--arch rn50 --res 224 --batch 256 --modes eager)
fi

built=1
for step in $steps; do
  if [ "$gpu" = 0 ] && [ -z "$smoke" ] && [ "$step" != info ]; then
    note "$step" "skipped: torch sees no GPU"
    continue
  fi
  case $step in
  info | build) ;;
  *) if [ -z "$built" ] || [ ! -x "$py" ]; then
    note "$step" "skipped: the native core is not built"
    continue
  fi ;;
  esac
  case $step in
  info) run info 60 bash -c info ;;
  build) run build 300 bash -c build || built= ;;
  tests) run tests 150 "$py" -m pytest -q -p no:cacheprovider -k "gpu or cuda" tests ;;
  heads) run heads 120 "$py" bench/step.py "${heads[@]}" ;;
  eager) run eager 340 "$py" bench/step.py "${eager[@]}" ;;
  compiled) run compiled 300 "$py" bench/step.py "${compiled[@]}" ;;
  data) run data 180 "$py" bench/end_to_end.py "${data[@]}" ;;
  retrieval) run retrieval 180 "$py" bench/retrieval_device.py "${search[@]}" ;;
  train) run train 300 bash -c train ;;
  small) run small 240 bash -c small ;;
  unlabelled) run unlabelled 240 bash -c unlabelled ;;
  profile) run profile 90 bash -c 'profile "$@"' profile "${profiled[@]}" ;;
  suite) run suite 400 "$py" -m pytest -q -p no:cacheprovider ${smoke:+-k nested} tests ;;
  *) note "$step" "skipped: there is no such step" ;;
  esac
done
fresh step "$step_rows"
fresh end_to_end "$data_rows"
fresh retrieval_device "$search_rows"
echo "== results in $out"
cat "$out/summary.txt"
exit $failed

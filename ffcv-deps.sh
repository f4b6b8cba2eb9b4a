#!/bin/sh
# What FFCV needs to compile and run: OpenCV, libturbojpeg, pkg-config. Installs them through apt-get where that is
# possible without asking; otherwise says in one message what to run.
set -u

packages="libopencv-dev libturbojpeg0-dev pkg-config"
present() {
  command -v pkg-config >/dev/null 2>&1 && pkg-config --exists opencv4 libturbojpeg
}

present && exit 0
if command -v apt-get >/dev/null 2>&1; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  if [ -z "$sudo" ] || sudo -n true 2>/dev/null; then
    echo "setup: $packages (apt-get, 700 MB)"
    log=$(mktemp)
    if { $sudo apt-get update && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y $packages; } >"$log" 2>&1 && present; then
      rm -f "$log"
      exit 0
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
  fi
fi
echo "setup: FFCV needs OpenCV and libturbojpeg with their headers. Install them, then run make again:
  Debian/Ubuntu  sudo apt-get install $packages
  elsewhere      the packages that give pkg-config the names opencv4 and libturbojpeg" >&2
exit 2

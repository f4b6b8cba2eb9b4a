#!/bin/sh
# Check for system packages by using them, and install what is missing.
#   native   C++ compiler and libjpeg-turbo's header, for the image core
#   ffcv     OpenCV and libturbojpeg, for the real FFCV
#   browser  Chromium, for the browser tests
# Installs through apt-get when it can run without a password; otherwise prints the command to run.
set -u

case ${1:-native} in
native)
  packages="libjpeg-dev"
  present() {
    printf '#include <cstdio>\n#include <jpeglib.h>\n' | ${CXX:-c++} -x c++ -fsyntax-only ${CPPFLAGS:-} - 2>/dev/null
  }
  help="jpeglib.h of libjpeg-turbo is missing. Install it, then run make again:
  Debian/Ubuntu  sudo apt-get install libjpeg-dev
  Fedora         sudo dnf install libjpeg-turbo-devel
  macOS          brew install jpeg-turbo"
  if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
    echo "setup: no C++ compiler. Debian/Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install" >&2
    exit 2
  fi
  # Homebrew's header is outside the default include path; CMake finds it.
  if command -v brew >/dev/null 2>&1 && brew --prefix jpeg-turbo >/dev/null 2>&1; then exit 0; fi
  ;;
ffcv)
  packages="libopencv-dev libturbojpeg0-dev pkg-config"
  present() {
    command -v pkg-config >/dev/null 2>&1 && pkg-config --exists opencv4 libturbojpeg
  }
  help="FFCV needs OpenCV and libturbojpeg with their headers. Install them, then run make again:
  Debian/Ubuntu  sudo apt-get install $packages
  elsewhere      the packages that provide opencv4 and libturbojpeg to pkg-config"
  ;;
browser)
  packages="chromium"
  present() {
    command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1
  }
  help="Chromium is missing: the browser tests are skipped. Debian: apt-get install chromium"
  ;;
*)
  echo "usage: sh system-deps.sh [native|ffcv|browser]" >&2
  exit 2
  ;;
esac

present && exit 0
if command -v apt-get >/dev/null 2>&1; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  if [ -z "$sudo" ] || sudo -n true 2>/dev/null; then
    echo "setup: $packages (apt-get)"
    log=$(mktemp)
    if { $sudo apt-get update && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y $packages; } >"$log" 2>&1 && present; then
      rm -f "$log"
      exit 0
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
  fi
fi
echo "setup: $help" >&2
exit 2

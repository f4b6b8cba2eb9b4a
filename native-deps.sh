#!/bin/sh
# What the native core needs to compile, checked by compiling: g++ and libjpeg-turbo's header. Installs the header
# through apt-get where that is possible without asking; otherwise says in one message what to run.
set -u

compiles() {
  printf '#include <cstdio>\n#include <jpeglib.h>\n' | ${CXX:-c++} -x c++ -fsyntax-only ${CPPFLAGS:-} - 2>/dev/null
}

if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
  echo "setup: no C++ compiler. Debian/Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++   macOS: xcode-select --install" >&2
  exit 2
fi
compiles && exit 0

if command -v brew >/dev/null 2>&1 && brew --prefix jpeg-turbo >/dev/null 2>&1; then
  exit 0 # Homebrew's header is outside the default path; CMake finds it
fi
if command -v apt-get >/dev/null 2>&1; then
  sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo -n"
  if [ -z "$sudo" ] || sudo -n true 2>/dev/null; then
    echo "setup: libjpeg-dev (apt-get)"
    log=$(mktemp)
    if { $sudo apt-get update && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y libjpeg-dev; } >"$log" 2>&1 && compiles; then
      rm -f "$log"
      exit 0
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
  fi
fi
echo "setup: jpeglib.h of libjpeg-turbo is missing. Install it, then run make again:
  Debian/Ubuntu  sudo apt-get install libjpeg-dev
  Fedora         sudo dnf install libjpeg-turbo-devel
  macOS          brew install jpeg-turbo" >&2
exit 2

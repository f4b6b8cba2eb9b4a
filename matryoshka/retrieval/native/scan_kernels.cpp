// Which kernels this CPU can run.
#include "scan_kernels.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace matryoshka::search {
namespace {

#ifdef MATRYOSHKA_ARM64
bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD) || defined(__APPLE__)  // all of Apple's that run macOS
  return true;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & 1ul << 20;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif

}  // namespace

const Kernels* const* available() {
  struct List {
    const Kernels* found[4] = {};
    List() {
      size_t n = 0;
#ifdef MATRYOSHKA_X86_64
      __builtin_cpu_init();
      const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c");
      const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni") &&
                        __builtin_cpu_supports("avx512vpopcntdq");
      if (avx2 && vnni) found[n++] = &kVnni;
      if (avx2) found[n++] = &kAvx2;
#endif
#ifdef MATRYOSHKA_ARM64
      if (has_dotprod()) found[n++] = &kDotprod;
      found[n++] = &kNeon;
#endif
      found[n] = &kPortable;
    }
  };
  static const List list;
  return list.found;
}

}  // namespace matryoshka::search

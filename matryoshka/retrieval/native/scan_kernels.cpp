// Detects which scan kernels this CPU can run.
#include "scan_kernels.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace matryoshka::search {
namespace {

#ifdef MATRYOSHKA_ARM64
bool has_dotprod() {
#if defined(__ARM_FEATURE_DOTPROD) || defined(__APPLE__)  // every Apple CPU that runs macOS
  return true;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & 1ul << 20;  // HWCAP_ASIMDDP
#else
  return false;
#endif
}
#endif

struct KernelList {
  const Kernels* kernels[4] = {};  // a null pointer ends the list

  KernelList() {
    size_t n = 0;
#ifdef MATRYOSHKA_X86_64
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("f16c");
    const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vpopcntdq");
    if (avx2 && vnni) kernels[n++] = &kVnni;
    if (avx2) kernels[n++] = &kAvx2;
#endif
#ifdef MATRYOSHKA_ARM64
    if (has_dotprod()) kernels[n++] = &kDotprod;
    kernels[n++] = &kNeon;
#endif
    kernels[n] = &kPortable;
  }
};

}  // namespace

const Kernels* const* available_kernels() {
  static const KernelList list;
  return list.kernels;
}

}  // namespace matryoshka::search

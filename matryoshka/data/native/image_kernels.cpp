// The image kernels for any CPU of this architecture, and the choice at run time.
#define MATRYOSHKA_KERNELS kPortableKernels
#include "image_kernels-inl.hpp"

namespace matryoshka {

const Kernels& kernels() {
#ifdef MATRYOSHKA_AVX2
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  if (avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace matryoshka

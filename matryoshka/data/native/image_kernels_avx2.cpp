// Compiled with -mavx2 -mbmi2, and called only where the CPU has both.
#define MATRYOSHKA_KERNELS kAvx2Kernels
#include "image_kernels-inl.hpp"

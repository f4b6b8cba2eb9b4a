// The image kernels for x86-64 with AVX2 and BMI2. Compiled with -mavx2 -mbmi2.
#define MATRYOSHKA_KERNELS kAvx2Kernels
#include "image_kernels-inl.hpp"

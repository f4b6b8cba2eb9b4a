#include "scan_kernels.hpp"
#include "scan_kernels_neon-inl.hpp"

const matryoshka::search::Kernels matryoshka::search::kDotprod = {
    "neon-dotprod", scan_codes, scan_bits, dot<uint16_t>, dot<float>};

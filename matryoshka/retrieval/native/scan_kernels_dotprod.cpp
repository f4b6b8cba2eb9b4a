// Scan kernels for 64-bit ARM with SDOT. Compiled with -march=armv8.2-a+dotprod.
#include "scan_kernels.hpp"
#include "scan_kernels_neon-inl.hpp"

namespace matryoshka::search {

const Kernels kDotprod = {"neon-dotprod", scan_codes, scan_bits, dot<uint16_t>, dot<float>};

}  // namespace matryoshka::search

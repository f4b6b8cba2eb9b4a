// Scan kernels for every 64-bit ARM CPU.
#include "scan_kernels.hpp"
#include "scan_kernels_neon-inl.hpp"

namespace matryoshka::search {

const Kernels kNeon = {"neon", scan_codes, scan_bits, dot<uint16_t>, dot<float>};

}  // namespace matryoshka::search

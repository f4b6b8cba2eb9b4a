#include "kernels.hpp"
#include "kernels_neon.inc"

const matryoshka::search::Kernels matryoshka::search::kDotprod = {"neon-dotprod", scan_codes, scan_bits, dot<uint16_t>,
                                                                  dot<float>};

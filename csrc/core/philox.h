// Random bits that are a function of where they are used, so that nothing is kept between passes:
// Philox4x32 (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with 7 rounds,
// the fewest that pass the paper's tests.
#pragma once

#include <cstdint>

namespace pykernels {

constexpr int kPhiloxRounds = 7;
constexpr int kPhiloxLanes = 16;
constexpr int kPhiloxBits = 4 * kPhiloxLanes;  // numbers of one call

// The 32-bit numbers of 16 counters (16 block + lane, y, z, 0): the first word of each, then the
// second, and so on.
inline void philox(uint64_t seed, uint32_t block, uint32_t y, uint32_t z,
                   uint32_t (&out)[kPhiloxBits]) {
  uint32_t (&a)[kPhiloxBits] = out;
  constexpr int n = kPhiloxLanes;
  for (int i = 0; i < n; ++i) {
    a[i] = block * n + static_cast<uint32_t>(i);
    a[n + i] = y;
    a[2 * n + i] = z;
    a[3 * n + i] = 0;
  }
  uint32_t key_0 = static_cast<uint32_t>(seed), key_1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int i = 0; i < n; ++i) {
      const uint64_t p = uint64_t{0xd2511f53u} * a[i], q = uint64_t{0xcd9e8d57u} * a[2 * n + i];
      a[i] = static_cast<uint32_t>(q >> 32) ^ a[n + i] ^ key_0;
      a[n + i] = static_cast<uint32_t>(q);
      a[2 * n + i] = static_cast<uint32_t>(p >> 32) ^ a[3 * n + i] ^ key_1;
      a[3 * n + i] = static_cast<uint32_t>(p);
    }
    key_0 += 0x9e3779b9u;
    key_1 += 0xbb67ae85u;
  }
}

}  // namespace pykernels

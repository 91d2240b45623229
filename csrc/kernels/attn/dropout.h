// Which scores dropout keeps. The answer is a function of (seed, batch * H + head, query, key) alone, so that forward,
// backward and every backend draw the same mask without storing it.
//
// Generator: Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds
// pass BigCrush). One call gives eight 16-bit numbers: those of one lane of a 16 x 16 block of scores, in the order in
// which an mma m16n8 accumulator pair holds them, so a tensor-core kernel needs one call for eight scores it owns.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SDPA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SDPA_HOST_DEVICE inline
#endif

namespace sdpa {

struct Philox8 {
  uint32_t word[4];  // number n (0..7) is half n % 2 of word n / 2
  SDPA_HOST_DEVICE uint32_t number(int n) const { return (word[n >> 1] >> ((n & 1) * 16)) & 0xffffu; }
};

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // keep where the 16-bit number is below it
  float rescale;       // of what is kept; exactly the inverse of the chance to be kept

  SDPA_HOST_DEVICE static Dropout make(float p, int64_t seed) {
    uint32_t threshold = static_cast<uint32_t>((1.0 - static_cast<double>(p)) * 65536.0 + 0.5);
    return {static_cast<uint64_t>(seed), threshold, threshold == 0 ? 0.f : 65536.f / static_cast<float>(threshold)};
  }

  SDPA_HOST_DEVICE static uint32_t high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
  }

  // The numbers of `lane` (0..31) in the 16 x 16 block (block_row, block_col).
  SDPA_HOST_DEVICE Philox8 draw(uint32_t batch_head, uint32_t block_row, uint32_t block_col, uint32_t lane) const {
    uint32_t c0 = block_col, c1 = block_row, c2 = batch_head, c3 = lane;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < 7; ++round) {
      const uint32_t hi0 = high(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
      const uint32_t hi1 = high(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
      c0 = hi1 ^ c1 ^ k0;
      c1 = lo1;
      c2 = hi0 ^ c3 ^ k1;
      c3 = lo0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
  }

  // Where score (row, col) stands: the lane that owns it in its 16 x 16 block and its number there. The lane holds
  // rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next, and the same 8 further right.
  SDPA_HOST_DEVICE static uint32_t lane_of(uint32_t row, uint32_t col) { return (row & 7) * 4 + ((col & 7) >> 1); }
  SDPA_HOST_DEVICE static int number_of(uint32_t row, uint32_t col) {
    return static_cast<int>((col & 1) + 2 * ((row >> 3) & 1) + 4 * ((col >> 3) & 1));
  }
  SDPA_HOST_DEVICE bool keep(uint32_t batch_head, uint32_t row, uint32_t col) const {
    return draw(batch_head, row >> 4, col >> 4, lane_of(row, col)).number(number_of(row, col)) < threshold;
  }
};

}  // namespace sdpa

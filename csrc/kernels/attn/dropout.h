// Which scores dropout keeps. The answer is a function of (seed, batch * H + head, query, key) alone, so that forward,
// backward and every backend draw the same mask without storing it.
//
// Generator: Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds
// pass BigCrush). One call decides on 16 scores: those of a 32 x 32 block whose rows are alike modulo 8 and whose
// columns are alike modulo 8. A tensor-core kernel's lane holds two of these sets of every block, whole, be its rows
// queries (forward) or keys (backward).
//
// A score's number has 15 bits: seven of its own above eight that the 16 scores of a call share (Philox gives 16 * 7 +
// 16 bits), and it is kept if its number is below a threshold. So the chance to be kept is exact to 1 / 32768, where
// seven or eight bits alone would make 0 of p = 0.001, and 16 scores are compared with one byte. What the sharing does:
// two scores of a call are correlated, by 1 / (4 * 128^2 * p * (1 - p)) at most (2e-4 at p = 0.1); others are not.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SDPA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SDPA_HOST_DEVICE inline
#endif

namespace sdpa {

// What became of the 16 scores of a call. That of score (row, col) has bit 7 of byte row / 8 % 2 + 2 * (col / 8 % 2) of
// word 2 * (row / 16 % 2) + col / 16 % 2; it is set if the score is dropped. The other bits mean nothing.
struct Dropped16 {
  uint32_t word[4];

  // Without an index that is not known to the compiler.
  SDPA_HOST_DEVICE uint32_t word_of(uint32_t row_half, uint32_t col_half) const {
    const uint32_t left = row_half ? word[2] : word[0], right = row_half ? word[3] : word[1];
    return col_half ? right : left;
  }
  SDPA_HOST_DEVICE bool keeps(uint32_t row, uint32_t col) const {
    const uint32_t bit = 7 + 8 * (row / 8 % 2) + 16 * (col / 8 % 2);
    return !(word_of(row / 16 % 2, col / 16 % 2) >> bit & 1);
  }
};

struct Dropout {
  static constexpr uint32_t kOne = 1 << 15;  // the threshold below which every number is

  uint64_t seed;
  uint32_t threshold;  // keep where the 15-bit number is below it
  float chance;        // to be kept
  float rescale;       // of what is kept; exactly the inverse of `chance`
  float log2_rescale;

  SDPA_HOST_DEVICE static Dropout make(float p, int64_t seed) {
    const uint32_t threshold = static_cast<uint32_t>((1.0 - static_cast<double>(p)) * kOne + 0.5);
    const float rescale = threshold == 0 ? 0.f : kOne / static_cast<float>(threshold);
    return {static_cast<uint64_t>(seed), threshold, static_cast<float>(threshold) / kOne, rescale, log2f(rescale)};
  }
#if defined(__CUDACC__)
  // The same, made where it stands: a value kept from before would hold registers that the code in between needs.
  __device__ __forceinline__ static Dropout make_anew(float p, const int64_t* seed) {
    asm volatile("" : "+f"(p));
    return make(p, *seed);
  }
#endif
  SDPA_HOST_DEVICE Dropout with_seed(int64_t its_seed) const {
    Dropout other = *this;
    other.seed = static_cast<uint64_t>(its_seed);
    return other;
  }

  // The scores of block (block_row, block_col) whose rows are row8 and whose columns are col8 modulo 8. kWideProducts:
  // fewer instructions, but in pairs of registers, and kernels that are short of them spill.
  template <bool kWideProducts = false>
  SDPA_HOST_DEVICE Dropped16 draw(uint32_t batch_head, uint32_t block_row, uint32_t block_col, uint32_t row8,
                                  uint32_t col8) const {
    uint32_t c0 = block_col, c1 = block_row, c2 = batch_head, c3 = row8 * 8 + col8;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int round = 0; round < 7; ++round) {
      const Product a = multiply<kWideProducts>(0xD2511F53u, c0), b = multiply<kWideProducts>(0xCD9E8D57u, c2);
      c0 = b.high ^ c1 ^ k0;
      c1 = b.low;
      c2 = a.high ^ c3 ^ k1;
      c3 = a.low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return compare({{c0, c1, c2, c3}});
  }

  SDPA_HOST_DEVICE bool keep(uint32_t batch_head, uint32_t row, uint32_t col) const {
    return draw(batch_head, row / 32, col / 32, row % 8, col % 8).keeps(row, col);
  }

 private:
  struct Product {
    uint32_t high, low;
  };
  // nvcc makes two multiplications of a product whose halves are both wanted, unless it cannot see what it is.
  template <bool kWide>
  SDPA_HOST_DEVICE static Product multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    if constexpr (kWide) {
      Product product;
      asm("{ .reg .b64 x; mul.wide.u32 x, %2, %3; mov.b64 {%0, %1}, x; }"
          : "=r"(product.low), "=r"(product.high)
          : "r"(b), "r"(a));
      return product;
    }
#endif
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
  }

  // The low seven bits of the 16 bytes are the scores' own. Those shared are the top bits of the first two words'
  // bytes: in pairs, a word's sign bit and the next word's, from the highest byte down.
  SDPA_HOST_DEVICE Dropped16 compare(const Dropped16& x) const {
    const uint32_t pairs = (x.word[0] & 0x80808080u) | (x.word[1] >> 1 & 0x40404040u);
    const uint32_t gathered = pairs * (1u | 1u << 6 | 1u << 12 | 1u << 18);  // the eight bits on top, no carries
    // own * 256 + (255 - shared) < threshold, if and only if own < bound = (threshold + shared) / 256.
    const uint32_t bound = ((threshold << 16) + (gathered >> 8)) >> 24;  // 0 to 128
    const uint32_t bounds = bound * 0x01010101u;
    Dropped16 dropped;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int n = 0; n < 4; ++n)
      dropped.word[n] = (x.word[n] | 0x80808080u) - bounds;  // byte by byte: 128 + own - bound
    return dropped;
  }
};

}  // namespace sdpa

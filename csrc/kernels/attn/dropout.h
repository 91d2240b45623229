// Which scores dropout keeps. The answer is a function of (seed, batch * H + head, query, key) alone, so that forward,
// backward and every backend draw the same mask without storing it.
//
// Generator: Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; 7 rounds
// pass BigCrush). Its key is constant and the seed, of 63 random bits, a part of the counter, so that no round keys are
// computed; of the other two counter words, which differ by row and by column, each first counts in the second round's
// products, so that a loop over the one or the other leaves out much of three rounds (see AlongColumns). One call
// decides on 16 scores: those of a 32 x 32 block whose rows are alike modulo 8 and whose columns are alike modulo 8. A
// tensor-core kernel's lane holds two of these sets of every block, whole, be its rows queries (forward) or keys
// (backward).
//
// A score's number has 15 bits: the low seven of a byte of its own above the byte of another score, so that the chance
// to be dropped is exact to 1 / 32768, where seven or eight bits alone would make 0 of p = 0.001. What that does: two
// scores of a call are correlated if the one's own bits leave open what becomes of it, which is 1 in 128, and the
// other's byte decides, in each of four scores the one with the next: by 0.4 % at most (0.2 % at p = 0.1). Others are
// not.
//
// The numbers are compared two at once, as the magnitudes of float16. A NaN is not below anything, hence the bound is
// on the rarer of the two, what is dropped or what is kept: it is 16384 (2.0) at most, below infinity.
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

// The generator's state, at last the 16 scores' own bytes, in the places of Dropped16's bits.
struct Philox {
  static constexpr uint32_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u;

  uint32_t word[4];

  // Rounds kFirst, kFirst + 1, ... 6. kWideProducts: fewer instructions, but in pairs of registers, and kernels that
  // are short of them spill.
  template <int kFirst, bool kWideProducts>
  SDPA_HOST_DEVICE void run() {
    round<kFirst, kWideProducts>();
    if constexpr (kFirst < 6) run<kFirst + 1, kWideProducts>();
  }
  template <int kRound, bool kWideProducts = false>
  SDPA_HOST_DEVICE void round() {
    const Product a = multiply<kWideProducts>(kFirst, word[0]), b = multiply<kWideProducts>(kSecond, word[2]);
    word[0] = b.high ^ word[1] ^ key(kRound, 0);
    word[1] = b.low;
    word[2] = a.high ^ word[3] ^ key(kRound, 1);
    word[3] = a.low;
  }
  SDPA_HOST_DEVICE static constexpr uint32_t key(uint32_t round, int n) {
    return round * (n == 0 ? 0x9E3779B9u : 0xBB67AE85u);
  }

  struct Product {
    uint32_t high, low;
  };
  // nvcc makes two multiplications of a product whose halves are both wanted, unless it cannot see what it is.
  template <bool kWide>
  SDPA_HOST_DEVICE static Product multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    if constexpr (kWide) {
      uint64_t product;
      asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(b), "r"(a));
      return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
    }
#endif
    const uint64_t product = static_cast<uint64_t>(a) * b;
    return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
  }
};

struct Dropout {
  static constexpr uint32_t kOne = 1 << 15;  // above every number

  uint64_t seed;
  uint32_t bounds;  // in both halves
  uint32_t keeps;   // what is below: ~0, or 0 if that is dropped
  float chance;     // to be kept
  float rescale;    // of what is kept; exactly the inverse of `chance`
  float log2_rescale;

  SDPA_HOST_DEVICE static Dropout make(float p, int64_t seed) {
    const uint32_t kept = static_cast<uint32_t>((1.0 - static_cast<double>(p)) * kOne + 0.5);
    const float rescale = kept == 0 ? 0.f : kOne / static_cast<float>(kept);
    const bool keeps = kept < kOne / 2;
    return {static_cast<uint64_t>(seed),
            (keeps ? kept : kOne - kept) * 0x00010001u,
            keeps ? ~0u : 0u,
            static_cast<float>(kept) / kOne,
            rescale,
            log2f(rescale)};
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

  // Of the scores of block (block_row, block_col) whose rows are row8 and whose columns are col8 modulo 8.
  SDPA_HOST_DEVICE Philox start(uint32_t batch_head, uint32_t block_row, uint32_t column_word) const {
    return {{static_cast<uint32_t>(seed) ^ batch_head, block_row, static_cast<uint32_t>(seed >> 32), column_word}};
  }
  SDPA_HOST_DEVICE static uint32_t column_word(uint32_t block_col, uint32_t row8, uint32_t col8) {
    return block_col * 64 + row8 * 8 + col8;
  }
  template <bool kWideProducts = false>
  SDPA_HOST_DEVICE Philox numbers(uint32_t batch_head, uint32_t block_row, uint32_t column_word) const {
    Philox x = start(batch_head, block_row, column_word);
    x.run<0, kWideProducts>();
    return x;
  }
  SDPA_HOST_DEVICE Dropped16 draw(uint32_t batch_head, uint32_t block_row, uint32_t block_col, uint32_t row8,
                                  uint32_t col8) const {
    const Philox x = numbers(batch_head, block_row, column_word(block_col, row8, col8));
    Dropped16 dropped;
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (int n = 0; n < 4; ++n) {
      dropped.word[n] = below_each(x.word[n]) ^ keeps;
    }
    return dropped;
  }

  SDPA_HOST_DEVICE bool keep(uint32_t batch_head, uint32_t row, uint32_t col) const {
    return draw(batch_head, row / 32, col / 32, row % 8, col % 8).keeps(row, col);
  }

  // Brings the even bytes to the places of the odd ones, and under each the one before.
  SDPA_HOST_DEVICE static uint32_t rotate(uint32_t x) { return x << 8 | x >> 24; }
  // For each half, all its bits: whether its number, all bits but the sign, is below the bound.
  SDPA_HOST_DEVICE uint32_t below(uint32_t x) const {
#if defined(__CUDA_ARCH__)
    uint32_t mask;
    asm("{ .reg .b32 x; abs.f16x2 x, %1; set.lt.u32.f16x2 %0, x, %2; }" : "=r"(mask) : "r"(x), "r"(bounds));
    return mask;
#else
    const uint32_t low = (x & 0x7fffu) < (bounds & 0x7fffu), high = (x >> 16 & 0x7fffu) < (bounds >> 16);
    return low * 0xffffu | high * 0xffff0000u;
#endif
  }
  // The same for each byte of a generator's word, in its place.
  SDPA_HOST_DEVICE uint32_t below_each(uint32_t x) const {
    return (below(x) & 0xff00ff00u) | (below(rotate(x)) & 0x00ff00ffu);
  }
#if defined(__CUDACC__)
  // Makes 0 of `low` and `high` where the number in this half of x drops it.
  __device__ __forceinline__ void drop(float& low, float& high, uint32_t x) const {
    asm("{ .reg .b32 x; .reg .pred keeps, low, high; setp.ne.u32 keeps, %4, 0; abs.f16x2 x, %2;"
        " setp.lt.xor.f16x2 low|high, x, %3, keeps;"
        " selp.f32 %0, 0f00000000, %0, low; selp.f32 %1, 0f00000000, %1, high; }"
        : "+f"(low), "+f"(high)
        : "r"(x), "r"(bounds), "r"(keeps));
  }
#endif
};

// What the draws along a head's block of rows have in common: of the first three rounds two products are left.
struct AlongColumns {
  uint32_t first, second, third[3];

  SDPA_HOST_DEVICE static AlongColumns make(const Dropout& dropout, uint32_t batch_head, uint32_t block_row) {
    AlongColumns common;
    Philox x = dropout.start(batch_head, block_row, 0);
    x.round<0>();
    common.first = x.word[2];
    common.second = x.word[1] ^ Philox::key(1, 0);
    x.round<1>();
    common.third[0] = x.word[3] ^ Philox::key(2, 1);
    const Philox::Product b = Philox::multiply<false>(Philox::kSecond, x.word[2]);
    common.third[1] = b.high ^ Philox::key(2, 0);
    common.third[2] = b.low;
    return common;
  }
  template <bool kWideProducts = false>
  SDPA_HOST_DEVICE Philox numbers(uint32_t column_word) const {
    const Philox::Product b = Philox::multiply<kWideProducts>(Philox::kSecond, column_word ^ first);
    const Philox::Product a = Philox::multiply<kWideProducts>(Philox::kFirst, b.high ^ second);
    Philox x{{b.low ^ third[1], third[2], a.high ^ third[0], a.low}};
    x.run<3, kWideProducts>();
    return x;
  }
};
// What all draws of a head have in common, which is all that is uniform for a warp: the first round's products.
struct DrawsOfHead {
  uint32_t row_bits, column_bits, second[2];

  SDPA_HOST_DEVICE static DrawsOfHead make(const Dropout& dropout, uint32_t batch_head) {
    Philox x = dropout.start(batch_head, 0, 0);
    x.round<0>();
    return {x.word[0], x.word[2], {x.word[1] ^ Philox::key(1, 0), x.word[3] ^ Philox::key(1, 1)}};
  }
  template <bool kWideProducts = false>
  SDPA_HOST_DEVICE Philox numbers(uint32_t block_row, uint32_t column_word) const {
    const Philox::Product a = Philox::multiply<kWideProducts>(Philox::kFirst, block_row ^ row_bits);
    const Philox::Product b = Philox::multiply<kWideProducts>(Philox::kSecond, column_word ^ column_bits);
    Philox x{{b.high ^ second[0], b.low, a.high ^ second[1], a.low}};
    x.run<2, kWideProducts>();
    return x;
  }
};

}  // namespace sdpa

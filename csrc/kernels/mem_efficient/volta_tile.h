// The parts of the float16 kernels on Volta's tensor cores: how a warp shares a tile of scores, how tensors come into
// shared memory and registers, and the two tile products.
//
// Sums are of float16 products, exact in float32, and always in the same order: a backward comes to the same scores as
// the forward, whichever of queries and keys it has as rows.
#pragma once

#include "../arch/mma_sm70.h"
#include "../attn/dropout.h"
#include "../attn/mask.h"
#include "statistics.h"
#include "tile.h"

namespace sdpa::efficient {

template <class Arch, class T>
constexpr bool kHasVolta = Arch::kId == 70 && std::is_same_v<T, __half>;

// What these kernels multiply is one tile wide. Wider heads are for float32 arithmetic.
constexpr int kWidestVolta = 128;

template <int kHeadDim>
bool is_one_tile(const ForwardParams& p) {
  return p.E <= kHeadDim && p.Ev <= kHeadDim;
}

// Eight neighbouring halves, the unit in which operands are kept: words 1 and 2 stand in each other's place. So the
// columns of a product that a lane owns are runs of four.
using Octet = uint4;

__device__ __forceinline__ Octet swapped(const uint4& x) {
  return {x.x, x.z, x.y, x.w};
}

// A matrix read octet by octet: at once where that can be, elsewhere four or single elements at a time.
struct OctetMatrix {
  Matrix<const __half> m;
  bool octets;  // every octet lies inside or outside, and aligned

  __device__ __forceinline__ static OctetMatrix of(const Operand& t, int64_t b, int64_t h, int64_t rows, int64_t cols) {
    const auto m = Matrix<const __half>::of(t, b, h, rows, cols);
    const bool is_aligned = m.row_stride % 8 == 0 && reinterpret_cast<uintptr_t>(m.data) % sizeof(Octet) == 0;
    return {m, m.col_stride == 1 && is_aligned && m.cols % 8 == 0};
  }

  // As it is in memory, if octets; zero where the matrix has nothing.
  __device__ __forceinline__ uint4 fast_octet(int row, int col) const {
    uint4 x = {};
    if (row < m.rows && col < m.cols) x = *reinterpret_cast<const uint4*>(m.data + row * m.row_stride + col);
    return x;
  }
  __device__ __forceinline__ Octet octet(int row, int col) const {
    if (octets) return swapped(fast_octet(row, col));
    const Quad<__half> left = m.raw_quad_at(row, col), right = m.raw_quad_at(row, col + 4);
    const uint2 x = reinterpret_cast<const uint2&>(left), y = reinterpret_cast<const uint2&>(right);
    return swapped({x.x, x.y, y.x, y.y});
  }
};

// Which part of a problem is a block's whose rows are queries.
template <int kRows, int kWarpRows>
struct QueryBlock {
  int batch, head, key_head, first_query;

  // Under causality the last queries have most to do: start them first, those of all heads.
  __device__ __forceinline__ static QueryBlock of(const ForwardParams& p) {
    const unsigned heads = static_cast<unsigned>(p.B * p.H), H = static_cast<unsigned>(p.H);
    const unsigned tiles = static_cast<unsigned>(ceil_div(p.L, kRows));
    const unsigned head_index = p.is_causal ? blockIdx.x % heads : blockIdx.x / tiles;
    const unsigned tile = p.is_causal ? tiles - 1 - blockIdx.x / heads : blockIdx.x % tiles;
    const unsigned head = head_index % H;
    return {static_cast<int>(head_index / H), static_cast<int>(head),
            static_cast<int>(head / static_cast<unsigned>(p.group)), static_cast<int>(tile * kRows)};
  }

  // What is computed from it is computed anew from here on: kept, it would hold registers that the products need.
  __device__ __forceinline__ void start_anew() {
    asm volatile("" : "+r"(batch), "+r"(head), "+r"(key_head), "+r"(first_query));
  }

  __device__ __forceinline__ int64_t head_index(const ForwardParams& p) const { return batch * p.H + head; }
  __device__ __forceinline__ int warp_query() const { return first_query + fresh_thread_index() / 32 * kWarpRows; }
  // Keys from here on are seen by none of the block's queries, of the warp's.
  __device__ __forceinline__ int key_end(const ForwardParams& p) const { return key_end(p, first_query + kRows); }
  __device__ __forceinline__ int warp_key_end(const ForwardParams& p) const {
    return warp_query() < p.L ? key_end(p, warp_query() + kWarpRows) : 0;
  }
  __device__ __forceinline__ OctetMatrix keys(const ForwardParams& p) {
    start_anew();
    return OctetMatrix::of(p.key, batch, key_head, p.S, p.E);
  }
  __device__ __forceinline__ OctetMatrix values(const ForwardParams& p) {
    start_anew();
    return OctetMatrix::of(p.value, batch, key_head, p.S, p.Ev);
  }

 private:
  __device__ __forceinline__ static int key_end(const ForwardParams& p, int query_end) {
    const int S = static_cast<int>(p.S);
    return p.is_causal ? min(S, query_end) : S;
  }
};

// A warp's share of a tile: kRowBlocks * 32 / kShare rows of it, by kScoreColumns columns of scores, by kResultColumns
// of a result. kShare quad pairs share their rows, and take a part of the columns each: every quad pair multiplies
// operands of 8 * kRowBlocks rows with what comes from shared memory, and that is read once for each quad pair, so
// what a warp reads for a multiplication falls with kRowBlocks, and the registers that a result takes with kShare.
//
// A lane owns rows R and R + 8 of 16 for each of its row blocks, and of 16 columns two runs of four, 8 apart: what two
// draws of dropout decide (see dropout.h), and as a mask is read.
template <int kRowBlocks_, int kShare_, int kScoreColumns, int kResultColumns>
struct VoltaTile {
  static constexpr int kRowBlocks = kRowBlocks_, kShare = kShare_;
  static constexpr int kRows = kRowBlocks * 32 / kShare, kRowsOwned = 2 * kRowBlocks;
  static constexpr int kColumns = kScoreColumns, kWidth = kResultColumns;
  static constexpr int kColumnShare = kColumns / kShare, kColumnBlocks = kColumnShare / 8;
  static constexpr int kColumnsOwned = 4 * kColumnBlocks;
  static constexpr int kResultShare = kWidth / kShare, kResultGroups = kResultShare / 16;
  static constexpr int kResultsOwned = 8 * kResultGroups;
  static constexpr int kOctets = kWidth / 8;   // of a row
  static constexpr int kStride = kOctets + 1;  // of a row in shared memory: 8 rows side by side hit all 32 banks
  static constexpr int kTileOctets = kColumns * kStride;
  static_assert(kShare == 1 || (kShare == 2 && kResultGroups % 2 == 0));
  static_assert(kColumnShare % 16 == 0 && kResultShare % 16 == 0);

  QuadPairLane at;

  __device__ static VoltaTile of_thread() { return {{fresh_thread_index() % 32}}; }
  __device__ __forceinline__ int share() const { return kShare == 1 ? 0 : at.quad_pair() & 1; }
  __device__ __forceinline__ int first_row() const {
    const int unit = at.quad_pair() / kShare;
    return 16 * (unit >> 1) + 4 * (unit & 1) + 2 * at.high() + at.odd();
  }
  __device__ __forceinline__ int row(int i) const { return first_row() + 32 / kShare * (i >> 1) + 8 * (i & 1); }
  // The row whose operand the lane holds.
  __device__ __forceinline__ int operand_row(int block) const {
    return first_row() + 32 / kShare * block + 8 * at.right();
  }
  __device__ __forceinline__ int column(int j) const {
    return kColumnShare * share() + 8 * (j >> 2) + 4 * at.right() + ((j & 3) ^ turned(share()));
  }
  __device__ __forceinline__ int result_column(int c) const {
    return 8 * result_octet(c >> 3, c >> 2 & 1) + 4 * at.right() + (c & 3);
  }

  // Quad pairs that share rows read different rows of a tile, or different columns, at the same time, and are not to
  // meet in a bank. So one of the two takes its runs of four columns in the order 2, 3, 0, 1, and of the result they
  // take 32 columns in turns.
  __device__ __forceinline__ static int turned(int share) { return 2 * share; }
  __device__ __forceinline__ int result_octet(int group, int half) const {
    constexpr int kTogether = kShare == 1 ? kResultGroups : 2;
    return 2 * (group % kTogether) + half + 2 * kTogether * share() + 2 * kTogether * kShare * (group / kTogether);
  }

  // Over the lanes that share a row.
  __device__ static float row_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(~0u, v, 2));
    return kShare == 1 ? v : fmaxf(v, __shfl_xor_sync(~0u, v, 4));
  }
  __device__ static float row_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 2);
    return kShare == 1 ? v : v + __shfl_xor_sync(~0u, v, 4);
  }
  __device__ __forceinline__ bool is_first_of_row() const { return at.right() == 0 && share() == 0; }
};

// A warp's rows of an operand, which stay: the lane's part of them, of each row kKept octets in registers and the rest,
// if there are too few of those, in a place in shared memory.
template <class Tile, int kKept = Tile::kOctets>
struct RowOperand {
  static constexpr int kCount = Tile::kRowBlocks * kKept, kRestCount = Tile::kRowBlocks * (Tile::kOctets - kKept);
  Octet at[Tile::kRowBlocks][kKept];
  const Octet* rest;  // the lane's
  int threads;

  static constexpr int kPassage = kCount < 8 ? kCount : 8;

  // `rest` has kRestCount octets a thread, `passage`, which is free afterwards, kPassage: to fill shared memory takes
  // no unrolled loop.
  __device__ __forceinline__ void load(const OctetMatrix& m, int first_row, Octet* passage, int threads,
                                       Octet* rest = nullptr) {
    const Tile t = Tile::of_thread();
    const auto octet = [&](int block, int n) { return m.octet(first_row + t.operand_row(block), n * 8); };
    passage += fresh_thread_index();
#pragma unroll
    for (int first = 0; first < kCount; first += kPassage) {
#pragma unroll 4
      for (int n = first; n < min(first + kPassage, kCount); ++n) {
        passage[(n - first) * threads] = octet(n / kKept, n % kKept);
      }
#pragma unroll
      for (int n = first; n < min(first + kPassage, kCount); ++n) {
        at[n / kKept][n % kKept] = passage[(n - first) * threads];
      }
    }
    if constexpr (kRestCount > 0) {
      rest += fresh_thread_index();
      constexpr int kOctets = Tile::kOctets - kKept;
#pragma unroll 4
      for (int n = 0; n < kRestCount; ++n) rest[n * threads] = octet(n / kOctets, kKept + n % kOctets);
    }
    this->rest = rest;
    this->threads = threads;
  }
  __device__ __forceinline__ Octet octet(int block, int n) const {
    return n < kKept ? at[block][n] : rest[(block * (Tile::kOctets - kKept) + n - kKept) * threads];
  }
};

// kColumns rows of a matrix on their way into shared memory. kIsEarly: in registers from `load` to `store`, so that
// something else can be computed meanwhile; if not, or if they cannot be read octet by octet, `store` reads them.
template <class Tile, int kThreads, bool kIsEarly = true>
struct OctetsInFlight {
  static constexpr int kRowStep = kThreads / Tile::kOctets, kCount = Tile::kColumns / kRowStep;
  static_assert(kThreads % Tile::kOctets == 0 && Tile::kColumns % kRowStep == 0);
  uint4 at[kCount];

  __device__ __forceinline__ void load(const OctetMatrix& m, int first_row) {
    if (!kIsEarly || !m.octets) return;
    const int thread = fresh_thread_index();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      at[n] = m.fast_octet(first_row + thread / Tile::kOctets + n * kRowStep, thread % Tile::kOctets * 8);
    }
  }
  __device__ __forceinline__ void store(Octet* tile, const OctetMatrix& m, int first_row) const {
    const int thread = fresh_thread_index();
    const int row = thread / Tile::kOctets, octet = thread % Tile::kOctets;
    tile += row * Tile::kStride + octet;
    if (kIsEarly && m.octets) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) tile[n * kRowStep * Tile::kStride] = swapped(at[n]);
    } else if (m.octets) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        tile[n * kRowStep * Tile::kStride] = swapped(m.fast_octet(first_row + row + n * kRowStep, octet * 8));
      }
    } else {
#pragma unroll 1
      for (int n = 0; n < kCount; ++n) {
        tile[n * kRowStep * Tile::kStride] = m.octet(first_row + row + n * kRowStep, octet * 8);
      }
    }
  }
};

// Calls f(i, j) for the scores a lane owns.
template <class Tile, class F>
__device__ __forceinline__ void for_each_score(F f) {
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnsOwned; ++j) f(i, j);
  }
}

// score += rows . columns
template <class Tile, int kKept>
__device__ __forceinline__ void multiply_scores(Scores<Tile>& score, const Tile& t, const RowOperand<Tile, kKept>& rows,
                                                const Octet* columns) {
  // So that of a block's 8 columns a lane comes to own 4 in a run.
  const int column = (4 * t.at.right() + 2 * t.at.high() + t.at.odd()) ^ Tile::turned(t.share());
  const Octet* const first = columns + (Tile::kColumnShare * t.share() + column) * Tile::kStride;
#pragma unroll
  for (int n = 0; n < Tile::kOctets; ++n) {
    Octet a[Tile::kRowBlocks];
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) a[i] = rows.octet(i, n);
    Octet b[Tile::kColumnBlocks];
#pragma unroll
    for (int j = 0; j < Tile::kColumnBlocks; ++j) b[j] = first[8 * j * Tile::kStride + n];
    // All sums in turn: one that follows upon itself has to wait.
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks; ++i) {
          mma_8x8x4<true, 2>(score[2 * i], score[2 * i + 1], 4 * j, step == 0 ? a[i].x : a[i].z,
                             step == 0 ? a[i].y : a[i].w, step == 0 ? b[j].x : b[j].z, step == 0 ? b[j].y : b[j].w);
        }
      }
    }
  }
}

__device__ __forceinline__ uint32_t packed(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Scores rounded to float16, as an operand: a lane that owns four columns of two rows comes to hold eight of one.
template <class Tile>
struct ScoreOperand {
  uint4 at[Tile::kRowBlocks][Tile::kColumnBlocks];  // columns 0 .. 7 of each block

  __device__ __forceinline__ static ScoreOperand of(const Scores<Tile>& score, const Tile& t) {
    ScoreOperand operand;
    const bool is_right = t.at.right() != 0;
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnBlocks; ++j) {
        uint32_t mine[2], theirs[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t upper = packed(score[2 * i][4 * j + 2 * n], score[2 * i][4 * j + 2 * n + 1]);
          const uint32_t lower = packed(score[2 * i + 1][4 * j + 2 * n], score[2 * i + 1][4 * j + 2 * n + 1]);
          mine[n] = is_right ? lower : upper;
          theirs[n] = __shfl_xor_sync(~0u, is_right ? upper : lower, 2);
        }
        operand.at[i][j] = {is_right ? theirs[0] : mine[0], is_right ? theirs[1] : mine[1],
                            is_right ? mine[0] : theirs[0], is_right ? mine[1] : theirs[1]};
      }
    }
    return operand;
  }

  // What the quad pair has that shares the rows.
  __device__ __forceinline__ ScoreOperand of_other_share() const {
    ScoreOperand other;
#pragma unroll
    for (int i = 0; i < Tile::kRowBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kColumnBlocks; ++j) {
        const uint4& x = at[i][j];
        other.at[i][j] = {__shfl_xor_sync(~0u, x.x, 4), __shfl_xor_sync(~0u, x.y, 4), __shfl_xor_sync(~0u, x.z, 4),
                          __shfl_xor_sync(~0u, x.w, 4)};
      }
    }
    return other;
  }
};

// result += scores * rows, for the columns of scores which `share` of the quad pairs has.
template <class Tile>
__device__ __forceinline__ void multiply_share(Results<Tile>& result, const Tile& t, const ScoreOperand<Tile>& scores,
                                               int share, const Octet* rows) {
  const Octet* const first = rows +
                             (Tile::kColumnShare * share + ((t.at.lane % 4) ^ Tile::turned(share))) * Tile::kStride +
                             t.result_octet(0, t.at.high());
#pragma unroll
  for (int j = 0; j < Tile::kColumnBlocks; ++j) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int c = 0; c < Tile::kResultGroups; ++c) {
        const Octet b = first[(8 * j + 4 * step) * Tile::kStride + t.result_octet(c, 0) - t.result_octet(0, 0)];
#pragma unroll
        for (int i = 0; i < Tile::kRowBlocks; ++i) {
          const uint4& a = scores.at[i][j];
          const uint32_t a0 = step == 0 ? a.x : a.z, a1 = step == 0 ? a.y : a.w;
          mma_8x8x4<false, 4>(result[2 * i], result[2 * i + 1], 8 * c, a0, a1, b.x, b.y);
          mma_8x8x4<false, 4>(result[2 * i], result[2 * i + 1], 8 * c + 2, a0, a1, b.z, b.w);
        }
      }
    }
  }
}

// Quad pairs that share rows start with their own columns: the order of a sum is theirs to choose.
template <class Tile>
__device__ __forceinline__ void multiply_result(Results<Tile>& result, const Tile& t, const ScoreOperand<Tile>& scores,
                                                const Octet* rows) {
  multiply_share(result, t, scores, t.share(), rows);
  if constexpr (Tile::kShare == 2) multiply_share(result, t, scores.of_other_share(), t.share() ^ 1, rows);
}

// Where a tile of scores begins, and how: rows are queries, or keys.
template <bool kRowsAreKeys>
struct ScoreOrigin {
  int first_row, first_column;
  __device__ __forceinline__ int query() const { return kRowsAreKeys ? first_column : first_row; }
  __device__ __forceinline__ int key() const { return kRowsAreKeys ? first_row : first_column; }
};

// Floats between queries (rows are keys: between those too) in a warp's place for a mask tensor's entries.
template <bool kRowsAreKeys, class Tile>
constexpr int kMaskStride = 4 + (kRowsAreKeys ? Tile::kRows : Tile::kColumns);
template <bool kRowsAreKeys, class Tile>
constexpr int kMaskFloats = (kRowsAreKeys ? Tile::kColumns : Tile::kRows) * kMaskStride<kRowsAreKeys, Tile>;

// Scales products to scores, as scale_and_mask in tile.h does, and adds what the mask has for them. A mask tensor's
// part goes through the warp's own place in shared memory: there are no registers for loads under way.
template <bool kRowsAreKeys, class Tile>
__device__ __forceinline__ void scale_and_mask(Scores<Tile>& score, const Tile& t, float scale, const Mask& mask,
                                               float* mask_tile, ScoreOrigin<kRowsAreKeys> origin) {
  constexpr int kQueries = kRowsAreKeys ? Tile::kColumns : Tile::kRows;
  constexpr int kKeys = kRowsAreKeys ? Tile::kRows : Tile::kColumns;
  constexpr int kStride = kMaskStride<kRowsAreKeys, Tile>;
  const int first_query = origin.query(), first_key = origin.key();
  const auto each = [&](auto f) {  // f(score, query, key), in the tile
    for_each_score<Tile>([&](int i, int j) {
      f(score[i][j], kRowsAreKeys ? t.column(j) : t.row(i), kRowsAreKeys ? t.row(i) : t.column(j));
    });
  };
  each([&](float& x, int, int) { x = __fmul_rn(x, scale); });
  if (mask.kind != MaskKind::kNone) {
    constexpr int kQuads = kKeys / 4;
    const int lane = fresh_thread_index() % 32;
    __syncwarp();  // the warp is done with what stood there
    mask.read([&](auto bias) {
#pragma unroll 2
      for (int n = lane; n < kQueries * kQuads; n += 32) {
        const int query = n / kQuads, key = n % kQuads * 4;
        *reinterpret_cast<float4*>(mask_tile + query * kStride + key) = bias(first_query + query, first_key + key);
      }
    });
    __syncwarp();
    each([&](float& x, int query, int key) { x = Mask::add(x, mask_tile[query * kStride + key]); });
  } else if (!mask.passes(first_query, first_query + kQueries, first_key, first_key + kKeys)) {
    const int queries_left = mask.L - first_query, keys_left = mask.S - first_key;
    const int diagonal = mask.is_causal ? first_query - first_key : kKeys;
    each([&](float& x, int query, int key) {
      if (query >= queries_left || key >= keys_left || key > query + diagonal) x = -INFINITY;
    });
  }
}

// Calls f(i, j, keep) for every score a lane owns. Four of them are one draw's (see dropout.h): rows i and i + 1 are 8
// apart, and so are columns j and j + 4.
template <bool kRowsAreKeys, class Tile, class F>
__device__ __forceinline__ void for_each_keep(const Tile& t, const Dropout& dropout, int64_t batch_head,
                                              ScoreOrigin<kRowsAreKeys> origin, F f) {
#pragma unroll
  for (int i = 0; i < Tile::kRowsOwned; i += 2) {
#pragma unroll
    for (int j = 0; j < Tile::kColumnsOwned; ++j) {
      if (j & 4) continue;
      const uint32_t query = origin.query() + (kRowsAreKeys ? t.column(j) : t.row(i));
      const uint32_t key = origin.key() + (kRowsAreKeys ? t.row(i) : t.column(j));
      const Dropped16 dropped =
          dropout.draw(static_cast<uint32_t>(batch_head), query / 32, key / 32, query % 8, key % 8);
      const uint32_t word = dropped.word_of(query / 16 % 2, key / 16 % 2);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int further_query = n % 2, further_key = n / 2;
        const bool keep = !(word >> (7 + 8 * further_query + 16 * further_key) & 1);
        f(i + (kRowsAreKeys ? further_key : further_query), j + 4 * (kRowsAreKeys ? further_query : further_key), keep);
      }
    }
  }
}

}  // namespace sdpa::efficient

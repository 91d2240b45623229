// Tiles in shared memory and the rows of one head in global memory, and the copies between them.
#pragma once

#include <cstdint>

#include "../arch/mma.h"
#include "../arch/shared_memory.h"
#include "../attn/params.h"

namespace sdpa {

constexpr int kChunkBytes = 16;                  // what one lane moves at once
constexpr int kChunkElements = kChunkBytes / 2;  // of a 16-bit type

// The rows of one (batch, head) of an operand.
template <class T>
struct HeadRows {
  // How wide an access the addresses of every row allow.
  enum class Access { kChunk, kWord, kElement };

  T* data;
  int64_t row_stride, col_stride;
  int rows, cols;
  Access access;

  __device__ __forceinline__ HeadRows(const Operand& x, int64_t batch, int64_t head, int64_t rows, int64_t cols)
      : data(static_cast<T*>(x.data) + batch * x.stride[0] + head * x.stride[1]),
        row_stride(x.stride[2]),
        col_stride(x.stride[3]),
        rows(static_cast<int>(rows)),
        cols(static_cast<int>(cols)) {
    const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(row_stride * sizeof(T));
    const bool dense = col_stride == 1;
    access = dense && bits % kChunkBytes == 0 ? Access::kChunk
             : dense && bits % 4 == 0         ? Access::kWord
                                              : Access::kElement;
  }

  __device__ __forceinline__ T* at(int row, int col) const {
    return data + int64_t{row} * row_stride + int64_t{col} * col_stride;
  }
};

// Eight neighbouring columns of a row as one 16-byte value; columns past the last read as zero and are not written.
template <class T>
__device__ __forceinline__ uint4 read_chunk(const HeadRows<T>& source, int row, int col) {
  const T* from = source.at(row, col);
  const int present = source.cols - col;
  if (source.access == HeadRows<T>::Access::kChunk && present >= kChunkElements) {
    return *reinterpret_cast<const uint4*>(from);
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    const uint32_t bits = i < present ? reinterpret_cast<const uint16_t*>(from)[i * source.col_stride] : 0;
    words[i / 2] = i % 2 == 0 ? bits : words[i / 2] | bits << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
__device__ __forceinline__ void write_chunk(const HeadRows<T>& target, int row, int col, const uint4& v) {
  T* to = target.at(row, col);
  const int present = target.cols - col;
  if (target.access == HeadRows<T>::Access::kChunk && present >= kChunkElements) {
    *reinterpret_cast<uint4*>(to) = v;
    return;
  }
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    if (i < present) {
      reinterpret_cast<uint16_t*>(to)[i * target.col_stride] = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
    }
  }
}

// What a lane adds to `base` to take part in an ldmatrix of a 16 x 16 block. The four 8 x 8 matrices arrive in four
// neighbouring registers, and an mma operand wants its own in neighbouring registers, so there are two orders of the
// matrices: down the rows first, or along the columns first.
struct LaneOffset {
  uint32_t rows_first, cols_first;
};

// Tile row r holds row r of what was copied. Other orders: score_mask.cuh.
struct InOrder {
  static __host__ __device__ constexpr int key(int row) { return row; }
};

// kRows x kCols elements of T, row after row, with the 16-byte chunks of a row permuted by the row number so that the
// eight rows an ldmatrix phase reads at one column lie in eight different bank groups. `base` must be a multiple of
// the row's bytes, and of 128. On an Arch without cp.async the copies go through registers.
//
// kPads: rows are an odd number of chunks apart instead, so that all addresses in a tile are one register and
// constants.
//
// kFewAddresses: one register for each of four column steps rather than for all of them. It is no faster by itself, but
// where registers run out one of the two settings spills.
template <class T, int kRows_, int kCols_, class Arch = Sm80, bool kFewAddresses = false,
          bool kPads = !kFewAddresses && (kCols_ & (kCols_ - 1)) != 0>
struct SharedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kChunksPerRow = kCols / kChunkElements;
  static constexpr bool kPowerOfTwo = (kChunksPerRow & (kChunksPerRow - 1)) == 0;
  static constexpr bool kIsPadded = kPads;
  static constexpr int kRowBytes = (kIsPadded ? kChunksPerRow | 1 : kChunksPerRow) * kChunkBytes;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(sizeof(T) == 2 && (kIsPadded || kChunksPerRow == 4 || kChunksPerRow % 8 == 0));

  uint32_t base;

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    if constexpr (kIsPadded) return row * kRowBytes + chunk * kChunkBytes;
    const int swizzle = kChunksPerRow == 4 ? (row >> 1) & 3 : row & 7;
    return row * kRowBytes + ((chunk ^ swizzle) * kChunkBytes);
  }

  // From the address of a chunk in one of the first rows of eight (or fewer, if `rows` is not a multiple of eight),
  // that of the chunk `rows` further down,
  static __device__ __forceinline__ uint32_t below(uint32_t address, int rows) {
    return (address ^ (offset(rows, 0) - rows * kRowBytes)) + rows * kRowBytes;
  }
  // and from that of chunk 0, of another in its row.
  static __device__ __forceinline__ uint32_t beside(uint32_t address, int chunk) {
    if constexpr (kIsPadded) return address + chunk * kChunkBytes;
    return (address ^ (chunk % 8 * kChunkBytes)) + chunk / 8 * 8 * kChunkBytes;
  }

  // Good for every tile with rows of this length.
  static __device__ __forceinline__ LaneOffset lane_offset() {
    const int lane = threadIdx.x % 32;
    return {offset(lane % 16, lane / 16), offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }

  // The 16 x 16 block (row_block, col_block). Swizzling is an exclusive or on the address bits of a bank cycle (128
  // bytes), so a step of columns inside one is that too; other steps are plain constants. Where the row's bytes are a
  // power of two, all steps of columns are one.
  __device__ __forceinline__ uint32_t block_address(uint32_t lane, int row_block, int col_block) const {
    if constexpr (kIsPadded) {
      return base + lane + col_block * 2 * kChunkBytes + row_block * 16 * kRowBytes;
    } else if constexpr (kFewAddresses) {
      return ((base + lane) ^ (col_block % 4 * 2 * kChunkBytes)) + col_block / 4 * 128 + row_block * 16 * kRowBytes;
    } else {
      return ((base + lane) ^ (col_block * 2 * kChunkBytes)) + row_block * 16 * kRowBytes;
    }
  }
  // The block as operand `a`.
  __device__ __forceinline__ void load_a(uint32_t (&r)[4], const LaneOffset& lane, int row_block, int col_block) const {
    ldmatrix(r, block_address(lane.rows_first, row_block, col_block));
  }
  // The block's transpose as operand `a`.
  __device__ __forceinline__ void load_a_transposed(uint32_t (&r)[4], const LaneOffset& lane, int row_block,
                                                    int col_block) const {
    ldmatrix_transposed(r, block_address(lane.cols_first, row_block, col_block));
  }
  // The block as two operands `b`, (r[0], r[1]) and (r[2], r[3]): its rows are k.
  __device__ __forceinline__ void load_b(uint32_t (&r)[4], const LaneOffset& lane, int row_block, int col_block) const {
    ldmatrix_transposed(r, block_address(lane.rows_first, row_block, col_block));
  }
  // The block's transpose as two operands `b`: its rows are n.
  __device__ __forceinline__ void load_b_transposed(uint32_t (&r)[4], const LaneOffset& lane, int row_block,
                                                    int col_block) const {
    ldmatrix(r, block_address(lane.cols_first, row_block, col_block));
  }

  // Fills the tile with rows [row0, row0 + kRows) in the given order, which must be a permutation of the row number's
  // bits; what lies outside the operand becomes zero. Complete after wait_for_copies and a barrier. kRecompute keeps
  // what is computed from the thread's number out of registers between two calls.
  template <int kThreads, class Order = InOrder, bool kRecompute = !std::is_same_v<Order, InOrder>, class U>
  __device__ __forceinline__ void fill(const HeadRows<U>& source, int row0, unsigned thread = threadIdx.x) const {
    // A pass takes kRowStep rows of a panel of columns: a thread keeps its place in the panel and its swizzle.
    constexpr int kLongest = kThreads / 8 < kChunksPerRow ? kThreads / 8 : kChunksPerRow;
    constexpr int kEven = kChunksPerRow & -kChunksPerRow;
    constexpr bool kWholeRows = kThreads % (8 * kChunksPerRow) == 0 && kRows * kChunksPerRow % kThreads == 0;
    constexpr int kPanel = kPowerOfTwo ? kLongest : kWholeRows ? kChunksPerRow : kEven < 8 ? kEven : 8;
    constexpr int kRowStep = kThreads / kPanel;
    static_assert(kChunksPerRow % kPanel == 0 && kRowStep % 8 == 0 && kRows % kRowStep == 0);
    using Access = typename HeadRows<U>::Access;
    if constexpr (kRecompute) asm volatile("" : "+r"(thread));
    const int first = thread / kPanel, first_key = Order::key(first), rows = source.rows - row0;
#pragma unroll
    for (int panel = 0; panel < kChunksPerRow; panel += kPanel) {
      const int chunk = panel + thread % kPanel;
      const int present = min(max(source.cols - chunk * kChunkElements, 0), kChunkElements);
      const uint32_t to = base + offset(first, chunk);
      const U* from = source.data + int64_t{row0 + first_key} * source.row_stride + chunk * kChunkElements;
      if (Arch::kAsyncCopy && source.access == Access::kChunk) {
#pragma unroll
        for (int row = 0; row < kRows; row += kRowStep) {
          cp_async<16>(to + row * kRowBytes, from, first_key + Order::key(row) < rows ? present * 2 : 0);
          from += (Order::key(row + kRowStep) - Order::key(row)) * source.row_stride;
        }
      } else if (Arch::kAsyncCopy && source.access == Access::kWord) {
#pragma unroll 1
        for (int row = 0; row < kRows; row += kRowStep) {
          const int bytes = first_key + Order::key(row) < rows ? present * 2 : 0;
#pragma unroll
          for (int word = 0; word < 4; ++word) {
            cp_async<4>(to + row * kRowBytes + word * 4, from + word * 2, min(max(bytes - word * 4, 0), 4));
          }
          from += (Order::key(row + kRowStep) - Order::key(row)) * source.row_stride;
        }
      } else if (!Arch::kAsyncCopy && source.access == Access::kChunk && present == kChunkElements) {
        // All loads, then all stores: the loads are on their way together.
        uint4 values[kRows / kRowStep];
#pragma unroll
        for (int row = 0; row < kRows; row += kRowStep) {
          uint4& v = values[row / kRowStep];
          v = {0, 0, 0, 0};
          if (first_key + Order::key(row) < rows) v = *reinterpret_cast<const uint4*>(from);
          from += (Order::key(row + kRowStep) - Order::key(row)) * source.row_stride;
        }
#pragma unroll
        for (int row = 0; row < kRows; row += kRowStep) {
          store_shared_16(to + row * kRowBytes, values[row / kRowStep]);
        }
      } else {
#pragma unroll 1
        for (int row = 0; row < kRows; row += kRowStep) {
          const int key = first_key + Order::key(row);
          const bool inside = key < rows;
          store_shared_16(to + row * kRowBytes,
                          inside ? read_chunk(source, row0 + key, chunk * kChunkElements) : uint4{0, 0, 0, 0});
        }
      }
    }
  }

  // A lane's share of operand `a` of the block, as a product leaves it, to its place.
  __device__ __forceinline__ void put_a(const uint32_t (&a)[4], int row_block, int col_block) const {
    const int lane = threadIdx.x % 32, row = row_block * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_shared_4(base + offset(row + i % 2 * 8, col_block * 2 + i / 2) + lane % 4 * 4, a[i]);
    }
  }

  // One warp writes its accumulators, kBlocks blocks of 16 rows from `row_block` on and every kColStep-th block of
  // columns from `col_block` on, to their place in the tile and from there to global rows row0 + Order::key(0),
  // row0 + Order::key(1), ... Nobody else may use this part of the tile meanwhile.
  template <int kBlocks, class Order = InOrder, int kColStep = 1, class U, int kColTiles>
  __device__ __forceinline__ void store(const float (&values)[kBlocks][kColTiles][4], int row_block,
                                        const HeadRows<U>& target, int row0, int col_block = 0) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int n = 0; n < kColTiles / 2; ++n) {
        uint32_t a[4];
        to_operand<T>(a, values[m][2 * n], values[m][2 * n + 1]);
        put_a(a, row_block + m, col_block + n * kColStep);
      }
    }
    __syncwarp();
    const int rows = std::is_same_v<Order, InOrder> ? min(target.rows - row0, kBlocks * 16) : kBlocks * 16;
#pragma unroll 1
    for (int i = lane; i < rows * kColTiles; i += 32) {
      const int row = i / kColTiles, chunk = (col_block + i % kColTiles / 2 * kColStep) * 2 + i % 2;
      const int to = row0 + Order::key(row);
      if (!std::is_same_v<Order, InOrder> && to >= target.rows) continue;
      const uint4 v = load_shared_16(base + offset(row_block * 16 + row, chunk));
      write_chunk(target, to, chunk * kChunkElements, v);
    }
  }
};

// kRows x kCols as copy_box leaves them: boxes of 32 or 64 columns, one after the other, each a SharedTile.
template <class T, int kRows, int kCols, class Arch>
struct BoxedTile {
  static constexpr int kBoxCols = kCols % 64 == 0 ? 64 : 32, kBoxes = kCols / kBoxCols, kBoxBlocks = kBoxCols / 16;
  using Box = SharedTile<T, kRows, kBoxCols, Arch>;
  static constexpr int kRowBytes = Box::kRowBytes, kBytes = kBoxes * Box::kBytes;
  static_assert(kBoxes * kBoxCols == kCols && Box::kBytes % 1024 == 0);

  uint32_t base;

  static __device__ __forceinline__ LaneOffset lane_offset() { return Box::lane_offset(); }
  __device__ __forceinline__ Box box(int number) const { return {base + number * Box::kBytes}; }
  __device__ __forceinline__ void load_a(uint32_t (&r)[4], const LaneOffset& lane, int row_block, int col_block) const {
    box(col_block / kBoxBlocks).load_a(r, lane, row_block, col_block % kBoxBlocks);
  }
  __device__ __forceinline__ void load_b(uint32_t (&r)[4], const LaneOffset& lane, int row_block, int col_block) const {
    box(col_block / kBoxBlocks).load_b(r, lane, row_block, col_block % kBoxBlocks);
  }
  __device__ __forceinline__ void load_b_transposed(uint32_t (&r)[4], const LaneOffset& lane, int row_block,
                                                    int col_block) const {
    box(col_block / kBoxBlocks).load_b_transposed(r, lane, row_block, col_block % kBoxBlocks);
  }
};

// The running softmax wants a positive scale. A negative one moves its sign into the query, and 0 becomes a query of
// zeros, which has the same scores. (Rare, so it is one more pass of a warp over its rows.)
template <class Tile>
__device__ __forceinline__ void fold_scale_sign(const Tile& query, int first_row, int rows, float scale) {
  const uint32_t keep = scale < 0.f ? 0xffffffffu : 0u, flip = scale < 0.f ? 0x80008000u : 0u;
  for (int i = threadIdx.x % 32; i < rows * Tile::kRowBytes / kChunkBytes; i += 32) {
    const uint32_t address = query.base + first_row * Tile::kRowBytes + i * kChunkBytes;
    const uint4 v = load_shared_16(address);
    store_shared_16(address, {(v.x & keep) ^ flip, (v.y & keep) ^ flip, (v.z & keep) ^ flip, (v.w & keep) ^ flip});
  }
  __syncwarp();
}

}  // namespace sdpa

// Tile after tile of one head's rows on their way to shared memory, with few instructions a tile.
#pragma once

#include <cstdint>

#include "../arch/shared_memory.h"
#include "../attn/params.h"
#include "tile.cuh"

namespace sdpa {

// Copies 16 bytes asynchronously to destination + kOffset, if `run`; zeros if not `present`.
template <int kOffset = 0>
__device__ __forceinline__ void cp_async_16_if(bool run, uint32_t destination, uint64_t source, bool present) {
  asm volatile(
      "{ .reg .pred run, skip; setp.ne.u32 run, %2, 0; setp.eq.u32 skip, %3, 0;"
      " @run cp.async.cg.shared.global [%0 + %4], [%1], 16, skip; }" ::"r"(destination),
      "l"(source), "r"(static_cast<uint32_t>(run)), "r"(static_cast<uint32_t>(present)), "n"(kOffset)
      : "memory");
}

// SharedTile::fill takes any operand and asks what it is each time. This takes what nearly every call has, rows of
// whole aligned chunks with a stride of 32 bits, and costs an address, a compare and a copy for each chunk of a thread.
// (Where fill did it, 100 to 190 of a key tile's 600 to 900 instructions were fill's.)
//
// Only the first kColumns columns of the tile are filled.
//
// kRecompute keeps what is computed from the thread's number out of registers between two calls. It costs 5 % at 128.
template <class Tile, int kThreads, class Order, int kColumns, bool kRecompute = false>
struct TileStream {
  static constexpr int kChunks = kColumns / kChunkElements;
  // Chunks of a row copied at once. In vain beyond the last: at 80 and 96 columns narrower panels are no faster.
  static constexpr int kMost = Tile::kPowerOfTwo && kThreads / 8 > 8 ? 16 : 8;
  static constexpr int kLeast = Tile::kPowerOfTwo ? Tile::kChunksPerRow : kChunks & -kChunks;
  static constexpr int kRowPanel = kLeast < kMost ? kLeast : kMost;
  static constexpr int kRowStep = kThreads / kRowPanel;
  static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0 && kRowPanel >= 4);

  // The address of the head's first row, or 0 if `fill` does not take this operand.
  static __device__ __forceinline__ uint64_t first_row(const Operand& x, int64_t batch, int64_t head, int64_t cols) {
    const int64_t row_bytes = x.stride[2] * 2;
    const uint64_t address = reinterpret_cast<uint64_t>(x.data) + (batch * x.stride[0] + head * x.stride[1]) * 2;
    const bool aligned = (address | static_cast<uint64_t>(row_bytes | cols * 2)) % kChunkBytes == 0;
    return aligned && x.stride[3] == 1 && row_bytes == static_cast<int>(row_bytes) ? address : 0;
  }

  // Rows [row0, row0 + kRows) of the head whose first row is at `from`, if `run`; rows from `rows` on and columns from
  // `cols` on become zero. No branches, so that the copies can be scheduled among other instructions.
  static __device__ __forceinline__ void fill(const Tile& tile, uint64_t from, int row_bytes, int row0, int rows,
                                              int cols, bool run) {
    unsigned thread = threadIdx.x;
    if constexpr (kRecompute) asm volatile("" : "+r"(thread));
    // Of eight rows, eight neighbouring threads take those that are in different banks.
    const int number = thread / kRowPanel;
    const int place =
        kRowPanel == 4 && !Tile::kPowerOfTwo ? (number & ~7) | (number & 7) >> 1 | (number & 1) << 2 : number;
    const int row = row0 + Order::key(place);
    const uint64_t row_from = from + int64_t{row} * row_bytes + thread % kRowPanel * kChunkBytes;
#pragma unroll
    for (int panel = 0; panel < kChunks; panel += kRowPanel) {
      const int chunk = panel + thread % kRowPanel;
      const bool mine = run && (panel + kRowPanel <= kChunks || chunk < kChunks);
      const int left = chunk * kChunkElements < cols ? rows - row : 0;
      copy<0>(mine, tile.base + Tile::offset(place, chunk), row_from + panel * kChunkBytes, row_bytes, left);
    }
  }

 private:
  // The chunk in the first row and in every kRowStep-th from there on: an address, a compare and a copy for each.
  template <int kRow>
  static __device__ __forceinline__ void copy(bool run, uint32_t to, uint64_t from, int row_bytes, int left) {
    if constexpr (kRow < Tile::kRows) {
      constexpr int kKey = Order::key(kRow);
      cp_async_16_if<kRow * Tile::kRowBytes>(run, to, from + int64_t{kKey} * row_bytes, kKey < left);
      copy<kRow + kRowStep>(run, to, from, row_bytes, left);
    }
  }
};

// A warp's share of a tile's rows, of kWarps such shares, in the given order from the head's row `row0` on; rows from
// `rows` on and columns from `cols` on become zero. Neighbouring lanes take neighbouring chunks, whatever rows these
// are of: the fewer rows an instruction touches, the less it costs.
template <int kWarps, class Order = InOrder, class Tile>
__device__ __forceinline__ void fill_share(const Tile& tile, uint64_t from, int row_bytes, int row0, int rows, int cols,
                                           bool run) {
  constexpr int kChunks = Tile::kChunksPerRow, kRows = Tile::kRows / kWarps;
  static_assert(kRows * kWarps == Tile::kRows && kRows * kChunks % 32 == 0);
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRows;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / 32; ++i) {
    const int number = i * 32 + lane, place = first + number / kChunks, chunk = number % kChunks;
    const int row = row0 + Order::key(place);
    cp_async_16_if(run, tile.base + Tile::offset(place, chunk), from + int64_t{row} * row_bytes + chunk * kChunkBytes,
                   row < rows && chunk * kChunkElements < cols);
  }
}

// Rows [from, from + count) of a tile, by one warp, from rows row0, row0 + 1, ... of the head whose first row is at
// `source`; rows from `rows` on and columns from `cols` on become zero.
template <int kColumns, class Tile>
__device__ __forceinline__ void fill_warp_rows(const Tile& tile, int from, int count, uint64_t source, int row_bytes,
                                               int row0, int rows, int cols) {
  constexpr int kChunks = kColumns / kChunkElements;
  static_assert(32 % (kChunks & -kChunks) == 0);
  constexpr int kPanel = (kChunks & -kChunks) < 32 ? (kChunks & -kChunks) : 32, kRowStep = 32 / kPanel;
  const int lane = threadIdx.x % 32, first = lane / kPanel;
#pragma unroll
  for (int panel = 0; panel < kChunks; panel += kPanel) {
    const int chunk = panel + lane % kPanel;
#pragma unroll 4
    for (int i = first; i < count; i += kRowStep) {
      cp_async_16_if(true, tile.base + Tile::offset(from + i, chunk),
                     source + chunk * kChunkBytes + int64_t{row0 + i} * row_bytes,
                     row0 + i < rows && chunk * kChunkElements < cols);
    }
  }
}

// A warp's accumulators of 16 rows, rounded to T and written in whole aligned chunks to rows row0, row0 + 1, ... of the
// head whose first row is at `target`. They pass through the block_row-th 16 rows of a tile, which nobody else may use
// meanwhile.
template <class T, int kCount, class Tile>
__device__ __forceinline__ void store_rows(const Tile& tile, int block_row, const float (&values)[kCount][4],
                                           uint64_t target, int row_bytes, int row0, int rows, int cols) {
  constexpr int kPanel = kCount <= 4 ? 4 : kCount <= 8 ? 8 : 16;  // lanes that write a row, a chunk each
  static_assert(kCount % 2 == 0 && kCount <= Tile::kChunksPerRow);
  const int lane = threadIdx.x % 32, i = lane % kPanel;
  const int chunk = i / 2 * 2 + i % 2;  // i; put like this, ptxas makes of the kernels' loops what was measured
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kCount; n += 2) {
    uint32_t a[4];
    to_operand<T>(a, values[n], values[n + 1]);
    tile.put_a(a, block_row, n / 2);
  }
  __syncwarp();
  const int end = i < kCount && chunk * kChunkElements < cols ? rows : 0;
#pragma unroll
  for (int row = lane / kPanel; row < 16; row += 32 / kPanel) {
    const uint4 v = load_shared_16(tile.base + Tile::offset(block_row * 16 + row, i));
    if (row0 + row < end) {
      store_global_16(target + int64_t{row0 + row} * row_bytes + chunk * kChunkBytes, v);
    }
  }
}

// Of a block's query tile, in shared memory: the addresses of the first rows of its head.
struct WorkPlace {
  static constexpr int kBytes = 48;
  uint32_t address;

  __device__ __forceinline__ void put(const ForwardParams& p, int batch_head, int first_row) const {
    const int heads = static_cast<int>(p.H), batch = batch_head / heads, head = batch_head % heads;
    const int key_head = head / static_cast<int>(p.group);
    const auto of = [&](const Operand& x, int its_head) {
      return reinterpret_cast<uint64_t>(x.data) + (batch * x.stride[0] + its_head * x.stride[1]) * 2;
    };
    const uint64_t rows[4] = {of(p.query, head), of(p.key, key_head), of(p.value, key_head), of(p.output, head)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_shared_16(address + 16 * i,
                      {static_cast<uint32_t>(rows[2 * i]), static_cast<uint32_t>(rows[2 * i] >> 32),
                       static_cast<uint32_t>(rows[2 * i + 1]), static_cast<uint32_t>(rows[2 * i + 1] >> 32)});
    }
    store_shared_4(address + 32, static_cast<uint32_t>(batch_head));
    store_shared_4(address + 36, static_cast<uint32_t>(first_row));
  }
  __device__ __forceinline__ uint64_t query_row() const { return load_shared_8(address); }
  __device__ __forceinline__ uint64_t key_row() const { return load_shared_8(address + 8); }
  __device__ __forceinline__ uint64_t value_row() const { return load_shared_8(address + 16); }
  __device__ __forceinline__ uint64_t output_row() const { return load_shared_8(address + 24); }
  __device__ __forceinline__ int batch_head() const { return load_shared_4(address + 32); }
  __device__ __forceinline__ int first_row() const { return load_shared_4(address + 36); }
};

// What a block knows of its head, in shared memory: the loop over key tiles has no registers for it.
struct HeadPlace {
  static constexpr int kBytes = 32;
  uint32_t address;

  __device__ __forceinline__ void put(uint64_t key_row, uint64_t value_row, int batch, int head, int key_head) const {
    const bool streams = key_row != 0 && value_row != 0;
    store_shared_16(address, {static_cast<uint32_t>(key_row), static_cast<uint32_t>(key_row >> 32),
                              static_cast<uint32_t>(value_row), static_cast<uint32_t>(value_row >> 32)});
    store_shared_16(address + 16, {static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
                                   static_cast<uint32_t>(key_head), static_cast<uint32_t>(streams)});
  }
  // The addresses of the head's first rows.
  __device__ __forceinline__ uint64_t key_row() const { return load_shared_8(address); }
  __device__ __forceinline__ uint64_t value_row() const { return load_shared_8(address + 8); }
  __device__ __forceinline__ int batch() const { return load_shared_4(address + 16); }
  __device__ __forceinline__ int head() const { return load_shared_4(address + 20); }
  __device__ __forceinline__ int key_head() const { return load_shared_4(address + 24); }
  __device__ __forceinline__ bool streams() const {
    return load_shared_4(address + 28) != 0;
  }  // whether a TileStream takes both
};

}  // namespace sdpa

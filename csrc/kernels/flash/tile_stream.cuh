// Tile after tile of one head's rows on their way to shared memory, with few instructions a tile.
#pragma once

#include <climits>
#include <cstdint>

#include "../arch/shared_memory.h"
#include "../attn/params.h"
#include "tile.cuh"

namespace sdpa {

// Copies 16 bytes asynchronously, if `run`; zeros if not `present`.
__device__ __forceinline__ void cp_async_16_if(bool run, uint32_t destination, uint64_t source, bool present) {
  asm volatile(
      "{ .reg .pred run, skip; setp.ne.u32 run, %2, 0; setp.eq.u32 skip, %3, 0;"
      " @run cp.async.cg.shared.global [%0], [%1], 16, skip; }" ::"r"(destination),
      "l"(source), "r"(static_cast<uint32_t>(run)), "r"(static_cast<uint32_t>(present))
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
  static constexpr int kPanel = Tile::kPowerOfTwo && kThreads / 8 > 8 ? 16 : 8;  // chunks of a row copied at once
  static constexpr int kRowPanel = kPanel < Tile::kChunksPerRow ? kPanel : Tile::kChunksPerRow;
  static constexpr int kRowStep = kThreads / kRowPanel;
  static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0);

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
    const int place = thread / kRowPanel;
    const int row = row0 + Order::key(place);
#pragma unroll
    for (int panel = 0; panel < kChunks; panel += kRowPanel) {
      const int chunk = panel + thread % kRowPanel;
      const bool mine = run && (panel + kRowPanel <= kChunks || chunk < kChunks);
      const int end = chunk * kChunkElements < cols ? rows : INT_MIN;
      const uint32_t to = tile.base + Tile::offset(place, chunk);
      const uint64_t chunk_from = from + chunk * kChunkBytes;
#pragma unroll
      for (int i = 0; i < Tile::kRows; i += kRowStep) {
        const int r = row + Order::key(i);
        cp_async_16_if(mine, to + i * Tile::kRowBytes, chunk_from + int64_t{r} * row_bytes, r < end);
      }
    }
  }
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
  __device__ __forceinline__ uint64_t key_row() const { return load_8(0); }
  __device__ __forceinline__ uint64_t value_row() const { return load_8(8); }
  __device__ __forceinline__ int batch() const { return load_4(16); }
  __device__ __forceinline__ int head() const { return load_4(20); }
  __device__ __forceinline__ int key_head() const { return load_4(24); }
  __device__ __forceinline__ bool streams() const { return load_4(28) != 0; }  // whether a TileStream takes both

 private:
  __device__ __forceinline__ uint64_t load_8(int offset) const {
    uint64_t x;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(address + offset) : "memory");
    return x;
  }
  __device__ __forceinline__ int load_4(int offset) const {
    int x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address + offset) : "memory");
    return x;
  }
};

}  // namespace sdpa

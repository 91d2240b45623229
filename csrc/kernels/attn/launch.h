// Launch helpers.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace sdpa {

// Lets kKernel use `bytes` of dynamic shared memory on the current device. The driver is asked once for each device.
template <auto kKernel>
cudaError_t allow_shared_bytes(int bytes) {
  static std::atomic<uint64_t> devices_done{0};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (devices_done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) devices_done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace sdpa

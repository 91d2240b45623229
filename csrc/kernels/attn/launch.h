// Launch helpers. Shared memory beyond 48 KB, and programmatic dependent launch (sm90 and newer): a kernel that starts
// while the one before it in the stream ends.
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

// Of the current device. (A template as all that calls the runtime here is: NVRTC does not know it.)
template <class Unused = void>
cudaError_t count_multiprocessors(int& count) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
#if defined(SDPA_RACECHECK)
  count = 6;  // as if: racecheck takes a minute for what fills a real chip (tests/sanitize.py)
  return cudaSuccess;
#else
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
#endif
}

// What a kernel launched by launch_early does before it touches memory: waits until all of the kernel before it is
// done.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on, if all blocks have come here, the next kernel may start, should it be one launched by launch_early.
__device__ __forceinline__ void let_successor_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What kAsk says of the current device, which it is asked once for each. (kAsk sets what it is given; if it gives an
// error, the answer is no for now.)
template <auto kAsk>
bool asked_once() {
  static std::atomic<uint64_t> devices_asked{0}, devices_able{0};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  const uint64_t bit = uint64_t{1} << device;
  if (!(devices_asked.load(std::memory_order_acquire) & bit)) {
    bool is_able = false;
    if (kAsk(device, is_able) != cudaSuccess) return false;
    if (is_able) devices_able.fetch_or(bit, std::memory_order_relaxed);
    devices_asked.fetch_or(bit, std::memory_order_release);
  }
  return (devices_able.load(std::memory_order_relaxed) & bit) != 0;
}

// Whether the code of kKernel that runs here was compiled for sm90 or newer.
template <auto kKernel>
bool runs_as_sm90() {
  constexpr auto kAsk = [](int, bool& is_able) {
    cudaFuncAttributes of{};
    const auto error = cudaFuncGetAttributes(&of, kKernel);
    is_able = of.ptxVersion >= 90 && of.binaryVersion >= 90;
    return error;
  };
  return asked_once<kAsk>();
}

// Launches a kernel that calls wait_for_predecessor. Early only if the code that will run was compiled for sm90 or
// newer: older code, translated for a newer chip, would not wait.
template <auto kKernel, class... Arguments>
cudaError_t launch_early(dim3 grid, int threads, int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = runs_as_sm90<kKernel>() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace sdpa

// The device intrinsics that the kernels use, by their CUDA names.
#pragma once

#include <type_traits>

#include "simt_runtime.h"

// Inlined, so that the emulator's return address lies in the kernel and names its line.
#define SIMT_DEVICE __forceinline__

// The emulator sets these whenever it switches to another thread. For the thread they never change: as constants, they
// are neither read again after a call nor checked like memory.
extern "C" {
extern const uint1 threadIdx;
extern const uint1 blockIdx;
extern const uint1 blockDim;  // not dim3: the compiler takes no object with a constructor for a constant
extern const uint1 gridDim;
}

// This block's dynamic shared memory. On the device the kernels' own header declares it `extern __shared__`.
#define BNEXT_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()

SIMT_DEVICE void __syncthreads() { simt::block_barrier(0); }
SIMT_DEVICE int __syncthreads_or(int predicate) { return simt::block_barrier(predicate); }

SIMT_DEVICE unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::warp_meet(simt::WarpOp::kBallot, mask, predicate != 0, 0, 32));
}
template <typename T>
SIMT_DEVICE T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = simt::warp_meet(simt::WarpOp::kShuffleXor, mask, bits, lane_mask, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

SIMT_DEVICE unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt::atomic_add(address, value, /*orders=*/false);
}
// The kernels' own wrappers of ld.acquire.gpu and atom.acq_rel.gpu, which on the device are inline PTX.
SIMT_DEVICE unsigned bnext_load_acquire(const unsigned* address) { return simt::load_acquire(address); }
SIMT_DEVICE unsigned bnext_add_acq_rel(unsigned* address, unsigned value) {
  return simt::atomic_add(address, value, /*orders=*/true);
}
SIMT_DEVICE void __nanosleep(unsigned) { simt::pause(); }

template <typename T>
SIMT_DEVICE T __ldg(const T* address) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  T value;
  simt::load(&value, address, sizeof(T));
  return value;
}
template <typename T>
SIMT_DEVICE T __ldcg(const T* address) {
  return __ldg(address);
}
template <typename T>
SIMT_DEVICE void __stcs(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  simt::store(address, &value, sizeof(T));
}

SIMT_DEVICE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }

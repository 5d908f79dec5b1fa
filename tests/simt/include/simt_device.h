// Device intrinsics, by their CUDA names.
#pragma once

#include <math.h>

#include <type_traits>

#include "simt_runtime.h"

// Inlined, so that the emulator's return address lies in the kernel and names its line.
#define SIMT_DEVICE __forceinline__

// The emulator sets these whenever it switches to another thread. For the thread they never change: as constants, they
// are neither read again after a call nor checked like memory.
extern "C" {
extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const uint3 blockDim;  // not dim3: the compiler takes no object with a constructor for a constant
extern const uint3 gridDim;
}

// This block's dynamic shared memory. On the device the kernels' own header declares it `extern __shared__`.
#define BNEXT_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()

SIMT_DEVICE void __syncthreads() { simt::block_barrier(simt::Reduce::kNone, 0); }
SIMT_DEVICE int __syncthreads_or(int predicate) { return simt::block_barrier(simt::Reduce::kOr, predicate); }
SIMT_DEVICE int __syncthreads_and(int predicate) { return simt::block_barrier(simt::Reduce::kAnd, predicate); }
SIMT_DEVICE int __syncthreads_count(int predicate) { return simt::block_barrier(simt::Reduce::kCount, predicate); }

SIMT_DEVICE void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_meet(simt::WarpOp::kSync, mask, 0, 0, warpSize); }
SIMT_DEVICE unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(simt::warp_meet(simt::WarpOp::kBallot, mask, predicate != 0, 0, warpSize));
}
SIMT_DEVICE int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::warp_meet(simt::WarpOp::kAny, mask, predicate != 0, 0, warpSize));
}
SIMT_DEVICE int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(simt::warp_meet(simt::WarpOp::kAll, mask, predicate != 0, 0, warpSize));
}

namespace simt {

template <typename T>
SIMT_DEVICE T shuffle(WarpOp op, unsigned mask, T value, int argument, int width) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = warp_meet(op, mask, bits, argument, width);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

template <typename T>
SIMT_DEVICE T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return simt::shuffle(simt::WarpOp::kShuffle, mask, value, lane, width);
}
template <typename T>
SIMT_DEVICE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return simt::shuffle(simt::WarpOp::kShuffleUp, mask, value, static_cast<int>(delta), width);
}
template <typename T>
SIMT_DEVICE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return simt::shuffle(simt::WarpOp::kShuffleDown, mask, value, static_cast<int>(delta), width);
}
template <typename T>
SIMT_DEVICE T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return simt::shuffle(simt::WarpOp::kShuffleXor, mask, value, lane_mask, width);
}

namespace simt {

template <typename T, typename Update>
SIMT_DEVICE T atomic_update(T* address, Update update, Order order = Order::kRelaxed) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T old;
  atomic_read(&old, address, sizeof(T));
  const T updated = update(old);
  atomic_write(address, &updated, sizeof(T), order);
  return old;
}

}  // namespace simt

template <typename T>
SIMT_DEVICE T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
SIMT_DEVICE T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [value](T) { return value; });
}
template <typename T>
SIMT_DEVICE T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old == compare ? value : old; });
}
template <typename T>
SIMT_DEVICE T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [value](T old) { return old > value ? old : value; });
}
template <typename T>
SIMT_DEVICE T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [value](T old) { return old < value ? old : value; });
}
template <typename T>
SIMT_DEVICE T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [value](T old) { return static_cast<T>(old | value); });
}
SIMT_DEVICE unsigned atomicInc(unsigned* address, unsigned last) {
  return simt::atomic_update(address, [last](unsigned old) { return old >= last ? 0u : old + 1u; });
}

// The kernels' own wrappers of ld.acquire.gpu and red.release.gpu, which on the device are inline PTX.
SIMT_DEVICE unsigned bnext_load_acquire(const unsigned* address) {
  unsigned value;
  simt::atomic_load(&value, address, sizeof(value), simt::Order::kAcquire);
  return value;
}
SIMT_DEVICE void bnext_add_release(unsigned* address, unsigned value) {
  simt::atomic_update(address, [value](unsigned old) { return old + value; }, simt::Order::kRelease);
}

SIMT_DEVICE void __threadfence() { simt::fence(simt::Scope::kDevice); }
SIMT_DEVICE void __threadfence_block() { simt::fence(simt::Scope::kBlock); }
SIMT_DEVICE void __nanosleep(unsigned) { simt::pause(); }
[[noreturn]] SIMT_DEVICE void __trap() { simt::trap(); }

namespace simt {

template <typename T>
SIMT_DEVICE T load(const T* address) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  T value;
  load(&value, address, sizeof(T));
  return value;
}
template <typename T>
SIMT_DEVICE void store(T* address, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16);
  store(address, &value, sizeof(T));
}

}  // namespace simt

template <typename T>
SIMT_DEVICE T __ldg(const T* address) {
  return simt::load(address);
}
template <typename T>
SIMT_DEVICE T __ldca(const T* address) {
  return simt::load(address);
}
template <typename T>
SIMT_DEVICE T __ldcg(const T* address) {
  return simt::load(address);
}
template <typename T>
SIMT_DEVICE T __ldcs(const T* address) {
  return simt::load(address);
}
template <typename T>
SIMT_DEVICE T __ldcv(const T* address) {
  return simt::load(address);
}
template <typename T>
SIMT_DEVICE void __stwb(T* address, std::type_identity_t<T> value) {
  simt::store(address, value);
}
template <typename T>
SIMT_DEVICE void __stcg(T* address, std::type_identity_t<T> value) {
  simt::store(address, value);
}
template <typename T>
SIMT_DEVICE void __stcs(T* address, std::type_identity_t<T> value) {
  simt::store(address, value);
}
template <typename T>
SIMT_DEVICE void __stwt(T* address, std::type_identity_t<T> value) {
  simt::store(address, value);
}

SIMT_DEVICE float __fadd_rn(float a, float b) { return a + b; }
SIMT_DEVICE float __fsub_rn(float a, float b) { return a - b; }
SIMT_DEVICE float __fmul_rn(float a, float b) { return a * b; }
SIMT_DEVICE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_DEVICE float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
SIMT_DEVICE double __dadd_rn(double a, double b) { return a + b; }
SIMT_DEVICE double __dmul_rn(double a, double b) { return a * b; }
SIMT_DEVICE double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }
SIMT_DEVICE float rsqrtf(float x) { return 1.0f / ::sqrtf(x); }
SIMT_DEVICE double rsqrt(double x) { return 1.0 / ::sqrt(x); }

SIMT_DEVICE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
SIMT_DEVICE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
SIMT_DEVICE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
SIMT_DEVICE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

SIMT_DEVICE int __popc(unsigned x) { return __builtin_popcount(x); }
SIMT_DEVICE int __ffs(int x) { return __builtin_ffs(x); }
SIMT_DEVICE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

SIMT_DEVICE int min(int a, int b) { return a < b ? a : b; }
SIMT_DEVICE int max(int a, int b) { return a > b ? a : b; }
SIMT_DEVICE unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
SIMT_DEVICE unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
SIMT_DEVICE long min(long a, long b) { return a < b ? a : b; }
SIMT_DEVICE long max(long a, long b) { return a > b ? a : b; }
SIMT_DEVICE long long min(long long a, long long b) { return a < b ? a : b; }
SIMT_DEVICE long long max(long long a, long long b) { return a > b ? a : b; }
SIMT_DEVICE unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
SIMT_DEVICE unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }

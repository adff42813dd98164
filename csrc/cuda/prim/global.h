// Global memory: reads of data that the kernel does not write, stores, atomic additions.
#pragma once

#include <cstring>

#include "cuda/prim/shared.h"

#if !defined(__CUDACC__)
#include "cuda/emu/global.h"
#endif

namespace fae::cuda {

#if defined(__CUDACC__)

namespace detail {
template <int kBytes> struct GlobalBits;
template <> struct GlobalBits<1> { using Type = unsigned char; };
template <> struct GlobalBits<2> { using Type = unsigned short; };
template <> struct GlobalBits<4> { using Type = unsigned int; };
template <> struct GlobalBits<8> { using Type = uint2; };
template <> struct GlobalBits<16> { using Type = uint4; };
}  // namespace detail

// A T of 1, 2, 4, 8 or 16 bytes at an address that is a multiple of its size; nobody
// writes it while the kernel runs.
template <class T>
FAE_DEVICE T load_global(const T* p) {
  using Bits = typename detail::GlobalBits<sizeof(T)>::Type;
  return detail::reinterpret<T>(__ldg(reinterpret_cast<const Bits*>(p)));
}

template <class T>
FAE_DEVICE void store_global(T* p, const T& value) {
  using Bits = typename detail::GlobalBits<sizeof(T)>::Type;
  *reinterpret_cast<Bits*>(p) = detail::reinterpret<Bits>(value);
}

// *p += value, atomically and without waiting for the old value. In no fixed order.
FAE_DEVICE void add_global(float* p, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "f"(value) : "memory");
}

#else

template <class T>
T load_global(const T* p, emu::Where where = emu::Where::here()) {
  T value;
  emu::load_global(&value, p, sizeof(T), where);
  return value;
}

template <class T>
void store_global(T* p, const T& value, emu::Where where = emu::Where::here()) {
  emu::store_global(p, &value, sizeof(T), where);
}

inline void add_global(float* p, float value, emu::Where where = emu::Where::here()) {
  emu::add_global(p, value, where);
}

#endif

}  // namespace fae::cuda

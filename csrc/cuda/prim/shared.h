// Shared memory: typed 32-bit addresses, and loads and stores of 2, 4, 8 or 16 bytes.
#pragma once

#include "cuda/prim/device.h"

#if !defined(__CUDACC__)
#include "cuda/emu/shared.h"
#endif

namespace fae::cuda {

// 16 bytes, the widest access of one thread.
struct alignas(16) Vec16 { uint32_t word[4]; };

// The address of a T in the block's shared memory. Addition counts elements.
template <class T>
struct Smem {
  uint32_t address = 0;

  FAE_DEVICE Smem operator+(int64_t n) const { return {address + uint32_t(n * int64_t(sizeof(T)))}; }
  template <class U>
  FAE_DEVICE Smem<U> as() const {
    return {address};
  }
};

#if defined(__CUDACC__)

// The start of the block's dynamic shared memory, aligned to 128 bytes.
FAE_DEVICE Smem<std::byte> shared_memory() {
  extern __shared__ __align__(128) unsigned char fae_shared_memory[];
  return {uint32_t(__cvta_generic_to_shared(fae_shared_memory))};
}

namespace detail {
template <int kBytes> struct SharedAccess;
template <> struct SharedAccess<2> {
  using Bits = uint16_t;
  static FAE_DEVICE Bits load(uint32_t address) {
    Bits x;
    asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(address));
    return x;
  }
  static FAE_DEVICE void store(uint32_t address, Bits x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
  }
};
template <> struct SharedAccess<4> {
  using Bits = uint32_t;
  static FAE_DEVICE Bits load(uint32_t address) {
    Bits x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
    return x;
  }
  static FAE_DEVICE void store(uint32_t address, Bits x) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
  }
};
template <> struct SharedAccess<8> {
  using Bits = uint2;
  static FAE_DEVICE Bits load(uint32_t address) {
    Bits x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
    return x;
  }
  static FAE_DEVICE void store(uint32_t address, Bits x) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
  }
};
template <> struct SharedAccess<16> {
  using Bits = Vec16;
  static FAE_DEVICE Bits load(uint32_t address) {
    Bits x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3])
                 : "r"(address));
    return x;
  }
  static FAE_DEVICE void store(uint32_t address, Bits x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.word[0]), "r"(x.word[1]),
                 "r"(x.word[2]), "r"(x.word[3])
                 : "memory");
  }
};

template <class To, class From>
FAE_DEVICE To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpret between sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
}  // namespace detail

// A T at an address that is a multiple of its size.
template <class T>
FAE_DEVICE T load_shared(Smem<T> at) {
  return detail::reinterpret<T>(detail::SharedAccess<sizeof(T)>::load(at.address));
}

template <class T>
FAE_DEVICE void store_shared(Smem<T> at, const T& value) {
  using Access = detail::SharedAccess<sizeof(T)>;
  Access::store(at.address, detail::reinterpret<typename Access::Bits>(value));
}

#else

FAE_DEVICE Smem<std::byte> shared_memory() { return {emu::shared_base()}; }

template <class T>
T load_shared(Smem<T> at, emu::Where where = emu::Where::here()) {
  T value;
  emu::load_shared(&value, at.address, sizeof(T), where);
  return value;
}

template <class T>
void store_shared(Smem<T> at, const T& value, emu::Where where = emu::Where::here()) {
  emu::store_shared(at.address, &value, sizeof(T), where);
}

#endif

}  // namespace fae::cuda

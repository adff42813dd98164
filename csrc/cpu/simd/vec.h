// The vector contract, and what is built from it alone.
//
// Each ISA header (vec_scalar.h, vec_avx2.h, vec_avx512.h, vec_neon.h) defines, in
// the namespace that its isa/*.cpp names by FAE_ISA_NAMESPACE, two structs F32 and
// F64 with these members; kernels use nothing else:
//
//   Elem, Reg, Mask         scalar, vector register, lane mask
//   kWidth                  lanes
//   kTileRows, kTileVecs    register tile of the micro-kernel: rows x vectors
//   zero() set1(x) load(p) load_n(p, n) store(p, r) store_n(p, r, n)
//                           load from Elem, and for F32 from BFloat16 and Float16;
//                           _n touches the first n lanes only, the others are 0
//   add sub mul div fma(a, b, c) = a * b + c
//   max(a, b)               b where either is NaN
//   less(a, b) equal(a, b) select(mask, a, b)  a where the mask is set
//   bytes_set(p, n)         lanes whose byte p[lane] is not 0
//   exp2(x)                 2^x for x <= 127; 0 for -inf, NaN for NaN, 1 for 0
//   reduce_max(r) reduce_add(r)
//   reduce_each(r)          lane i: the sum of the lanes of r[i], for kWidth registers
//   max_each(r)             the same of their maxima, where products have tile registers
//   transpose(r)            kWidth x kWidth block held in r[kWidth], in place
//   Words                   vectors of unsigned 64-bit lanes, for random numbers, with these members:
//
//   Reg, kWidth, set1(x) load(p) store(p, r) add(a, b) bit_xor(a, b)
//   mul_low(a, b)           the 64-bit products of the low halves
//   high(a)                 the high halves, as low ones
//   pair_low(a, b)          a's low halves below b's
//   zip_low(a, b) zip_high(a, b)  lanes a[0] b[0] a[2] b[2] ..., and a[1] b[1] a[3] b[3] ...; a and b
//                           themselves where a register is one lane
#pragma once

#include "core/dtype.h"

#ifndef FAE_ISA_NAMESPACE
#error "include this from an isa/*.cpp, which names its namespace"
#endif

#define FAE_INLINE inline __attribute__((always_inline))

// Included first by every isa/*.cpp: all standard and core headers, at the baseline
// target, before the file switches to its own. Nothing of std:: is instantiated below
// FAE_TARGET_BEGIN, so no shared inline function is ever built for a newer ISA.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/problem.h"
#include "cpu/api.h"
#include "cpu/kernel_table.h"

#define FAE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FAE_TARGET_BEGIN(features) \
  FAE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FAE_TARGET_END FAE_PRAGMA(clang attribute pop)
#else
// GCC's own intrinsics leave "undefined" operands uninitialised on purpose.
#define FAE_TARGET_BEGIN(features)                           \
  FAE_PRAGMA(GCC diagnostic ignored "-Wuninitialized")       \
  FAE_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") \
  FAE_PRAGMA(GCC push_options) FAE_PRAGMA(GCC target(features))
#define FAE_TARGET_END FAE_PRAGMA(GCC pop_options)
#endif

// The source line that called a primitive: every report of the emulator names it.
#pragma once

#include <cstring>
#include <string>

namespace fae::cuda::emu {

// `here()` as a default argument is the line of the call itself.
struct Where {
  const char* file = "";
  int line = 0;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Where& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  bool operator!=(const Where& other) const { return !(*this == other); }
};

// "csrc/cuda/tile/rows.h:12": the path from the repository's root where it shows.
std::string text(const Where& where);

}  // namespace fae::cuda::emu

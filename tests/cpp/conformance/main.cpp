// Records what the primitives do, or compares it with a record.
//
//   conformance --record FILE       writes the results of this machine
//   conformance --check FILE...     compares with records; status 1 when they differ
//
// On a card:    nvcc -std=c++20 -x cu -Icsrc -Itests/cpp tests/cpp/conformance/main.cpp
//               -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
// On no card:   g++ -std=c++20 -Icsrc -Itests/cpp tests/cpp/conformance/main.cpp csrc/cuda/emu/*.cpp
//
// A card's record is hardware.txt beside this file, the emulator's is emulator.txt.
#include <cstdio>

#include "conformance/results.h"

namespace conformance = fae::cuda::conformance;

int main(int argc, char** argv) try {
  const std::string mode = argc > 2 ? argv[1] : "";
  if (mode == "--record" && argc == 3) {
    std::ofstream file(argv[2]);
    file << conformance::to_text(conformance::compute(), conformance::source_name());
    file.close();
    if (!file) throw std::runtime_error(std::string("cannot write ") + argv[2]);
    return 0;
  }
  if (mode == "--check") {
    const conformance::Results results = conformance::compute();
    bool same = true;
    for (int i = 2; i < argc; ++i) {
      const conformance::Results wanted = conformance::read(argv[i]);
      const std::string text = wanted.empty() ? "no results\n" : conformance::difference(results, wanted);
      std::printf("%s: %s", argv[i], text.empty() ? "same\n" : ("\n" + text).c_str());
      same = same && text.empty();
    }
    return same ? 0 : 1;
  }
  std::fprintf(stderr, "usage: conformance --record FILE | --check FILE...\n");
  return 2;
} catch (const std::exception& error) {
  std::fprintf(stderr, "conformance: %s\n", error.what());
  return 1;
}

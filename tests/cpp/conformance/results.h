// Results of all cases: computed here, by the card or the emulator, or read from a file.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "conformance/cases.h"
#if !defined(__CUDACC__)
#include "cuda/emu/launch.h"
#endif

namespace fae::cuda::conformance {

// Case name -> kRounds x 32 lanes x words.
using Results = std::map<std::string, std::vector<uint32_t>>;

#if defined(__CUDACC__)

template <class Case>
__global__ void case_kernel(const uint32_t* in, uint32_t* out) {
  run_case<Case>(in, out);
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

template <class Case>
void run_here(const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
  uint32_t *device_in = nullptr, *device_out = nullptr;
  check(cudaMalloc(&device_in, in.size() * 4));
  check(cudaMalloc(&device_out, out.size() * 4));
  check(cudaMemcpy(device_in, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  case_kernel<Case><<<kRounds, kWarpSize, kSharedBytes>>>(device_in, device_out);
  check(cudaGetLastError());
  check(cudaMemcpy(out.data(), device_out, out.size() * 4, cudaMemcpyDeviceToHost));
  check(cudaFree(device_in));
  check(cudaFree(device_out));
}

inline std::string source_name() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  return std::string(properties.name) + ", sm_" + std::to_string(properties.major) +
         std::to_string(properties.minor);
}

#else

template <class Case>
void run_here(const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
  // Copied: 16-byte accesses want aligned memory.
  std::vector<Vec16> aligned(in.size() / 4);
  memcpy(aligned.data(), in.data(), in.size() * 4);
  const auto* const words = aligned.data()->word;
  emu::ScopedRange in_range((const void*)words, in.size() * 4, "in", emu::Access::kRead);
  emu::ScopedRange out_range((const void*)out.data(), out.size() * 4, "out", emu::Access::kReadWrite,
                             emu::Contents::kUnset);
  emu::launch({Case::kName, kRounds, kWarpSize, kSharedBytes}, [&] { run_case<Case>(words, out.data()); });
}

inline std::string source_name() { return "emulator"; }

#endif

template <class... Cases>
Results results_of() {
  Results results;
  const auto add = [&]<class Case>(const Case*) {
    std::vector<uint32_t> in(size_t(kRounds) * kWarpSize * Case::kIn);
    std::vector<uint32_t> out(size_t(kRounds) * kWarpSize * Case::kOut);
    for (size_t i = 0; i < in.size(); ++i) {
      const int at = int(i) / Case::kIn;
      in[i] = Case::input(at / kWarpSize, at % kWarpSize, int(i) % Case::kIn);
    }
    run_here<Case>(in, out);
    results[Case::kName] = out;
  };
  (add(static_cast<const Cases*>(nullptr)), ...);
  return results;
}

inline Results compute() {
  return results_of<LdmatrixX4, LdmatrixX4Transposed, MmaPairs<Float16>, MmaPairs<BFloat16>, MmaTf32,
                    MmaTf32LowBits, PackPair<Float16>, PackPair<BFloat16>, Widen<Float16>, Widen<BFloat16>,
                    ToTf32, ShuffleXor, Shuffle, Votes, CopyAsync, Exp2Fast>();
}

// One line per case and round: its name, then the words of lane 0, of lane 1, ...
inline std::string to_text(const Results& results, const std::string& source) {
  std::ostringstream text;
  text << "# " << source << '\n' << std::hex << std::setfill('0');
  for (const auto& [name, words] : results) {
    for (size_t i = 0; i < words.size(); ++i) {
      if (i % (words.size() / kRounds) == 0) text << (i ? "\n" : "") << name;
      text << ' ' << std::setw(8) << words[i];
    }
    text << '\n';
  }
  return text.str();
}

// Empty when there is no such file.
inline Results read(const std::string& path) {
  Results results;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream fields(line);
    std::string name, word;
    if (!(fields >> name) || name == "#") continue;
    while (fields >> word) results[name].push_back(uint32_t(std::stoul(word, nullptr, 16)));
  }
  return results;
}

// Two exponentials may lie 2 ulp off the true value in opposite directions.
inline bool same(const std::string& name, uint32_t a, uint32_t b) {
  if (name != Exp2Fast::kName) return a == b;
  return std::llabs(int64_t(a) - int64_t(b)) <= 4;
}

// What differs, one line per case; empty when nothing does.
inline std::string difference(const Results& got, const Results& wanted) {
  std::ostringstream text;
  text << std::hex << std::setfill('0');
  for (const auto& [name, words] : wanted) {
    const auto found = got.find(name);
    if (found == got.end() || found->second.size() != words.size()) {
      text << name << ": another shape\n";
      continue;
    }
    for (size_t i = 0; i < words.size(); ++i) {
      if (same(name, found->second[i], words[i])) continue;
      text << name << ": word " << std::dec << i << std::hex << " is " << std::setw(8) << found->second[i]
           << ", recorded " << std::setw(8) << words[i] << '\n';
      break;
    }
  }
  for (const auto& [name, words] : got) {
    if (!wanted.count(name)) text << name << ": not recorded\n";
  }
  return text.str();
}

}  // namespace fae::cuda::conformance

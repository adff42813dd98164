// Groups the accesses of a warp's lanes and counts what they cost. Internal; the results
// are counters.h's.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "cuda/emu/counters.h"
#include "cuda/emu/where.h"

namespace fae::cuda::emu {

enum class Space : uint8_t { kShared, kGlobal };

// An access of one warp: an address per lane of `mask`.
struct WarpAccess {
  uint32_t mask = 0;
  uint32_t bytes = 0;
  std::array<uint64_t, 32> address{};
};

// Passes over the banks beyond one for each 128 bytes' worth of lanes.
uint64_t extra_wavefronts(const WarpAccess& access);

struct Sectors {
  uint64_t touched;
  uint64_t ideal;
};
Sectors sectors(const WarpAccess& access);

class AccessRecorder {
 public:
  void note(int thread, Space space, const char* op, const Where& where, uint64_t address, uint32_t bytes);
  void note_warp(Space space, const char* op, const Where& where, const WarpAccess& access);
  // The lanes of a warp have met: their k-th accesses at a line belong together.
  void finish_interval(int warp);
  // Forgets what an interval has begun.
  void drop_intervals();

  std::vector<AccessSite> report() const;
  void reset() { sites_.clear(), ids_.clear(), warps_ = {}; }

 private:
  struct Site {
    Where where;
    const char* op;
    Space space;
    uint64_t accesses = 0, extra_wavefronts = 0;
    Sectors sectors{0, 0};
  };
  struct Open {  // accesses of one warp at one site in the present interval
    int site;
    std::array<uint32_t, 32> count{};  // of a lane
    std::vector<WarpAccess> accesses;
    size_t used = 0;
  };
  using Key = std::tuple<const char*, int, const char*, Space>;

  int site_of(Space space, const char* op, const Where& where);
  static void add(Site& site, const WarpAccess& access);

  std::vector<Site> sites_;
  std::map<Key, int> ids_;
  std::array<std::vector<Open>, 32> warps_;
};

}  // namespace fae::cuda::emu

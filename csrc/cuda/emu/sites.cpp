#include "cuda/emu/sites.h"

#include <algorithm>

namespace fae::cuda::emu {

uint64_t extra_wavefronts(const WarpAccess& access) {
  // The lanes of one pass: as many as ask for 128 bytes.
  const int lanes = access.bytes <= 4 ? 32 : int(128 / access.bytes);
  uint64_t extra = 0;
  for (int first = 0; first < 32; first += lanes) {
    std::array<uint64_t, 64> words;
    size_t count = 0;
    for (int lane = first; lane < first + lanes; ++lane) {
      if (!(access.mask >> lane & 1)) continue;
      for (uint32_t b = 0; b < access.bytes; b += 4) words[count++] = (access.address[size_t(lane)] + b) / 4;
    }
    std::sort(words.begin(), words.begin() + count);
    std::array<int, 32> of_bank{};
    for (size_t i = 0; i < count; ++i) {
      if (i == 0 || words[i] != words[i - 1]) ++of_bank[words[i] % 32];
    }
    const int wavefronts = *std::max_element(of_bank.begin(), of_bank.end());
    if (wavefronts > 1) extra += uint64_t(wavefronts - 1);
  }
  return extra;
}

Sectors sectors(const WarpAccess& access) {
  std::array<uint64_t, 32> addresses;
  size_t count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (access.mask >> lane & 1) addresses[count++] = access.address[size_t(lane)];
  }
  std::sort(addresses.begin(), addresses.begin() + count);
  // Accesses are aligned to their size: two of them are the same or share no byte.
  uint64_t touched = 0, different = 0;
  for (size_t i = 0; i < count; ++i) {
    different += i == 0 || addresses[i] != addresses[i - 1];
    touched += i == 0 || addresses[i] / 32 != addresses[i - 1] / 32;
  }
  return {touched, (different * access.bytes + 31) / 32};
}

int AccessRecorder::site_of(Space space, const char* op, const Where& where) {
  const auto [it, is_new] = ids_.try_emplace(Key{where.file, where.line, op, space}, int(sites_.size()));
  if (is_new) sites_.push_back({where, op, space});
  return it->second;
}

void AccessRecorder::add(Site& site, const WarpAccess& access) {
  ++site.accesses;
  if (site.space == Space::kShared) {
    site.extra_wavefronts += emu::extra_wavefronts(access);
  } else {
    const Sectors s = emu::sectors(access);
    site.sectors.touched += s.touched;
    site.sectors.ideal += s.ideal;
  }
}

void AccessRecorder::note_warp(Space space, const char* op, const Where& where, const WarpAccess& access) {
  add(sites_[size_t(site_of(space, op, where))], access);
}

void AccessRecorder::note(int thread, Space space, const char* op, const Where& where, uint64_t address,
                          uint32_t bytes) {
  const int site = site_of(space, op, where);
  const size_t lane = size_t(thread % 32);
  std::vector<Open>& opens = warps_[size_t(thread / 32)];
  auto open = std::find_if(opens.begin(), opens.end(), [&](const Open& o) { return o.site == site; });
  if (open == opens.end()) {
    opens.push_back({});
    open = opens.end() - 1;
    open->site = site;
  }
  const size_t k = open->count[lane]++;
  if (k == open->used) {
    if (open->accesses.size() == k) open->accesses.emplace_back();
    open->accesses[k] = {};
    ++open->used;
  }
  WarpAccess& access = open->accesses[k];
  access.mask |= 1u << lane;
  access.bytes = bytes;
  access.address[lane] = address;
}

void AccessRecorder::finish_interval(int warp) {
  for (Open& open : warps_[size_t(warp)]) {
    for (size_t k = 0; k < open.used; ++k) add(sites_[size_t(open.site)], open.accesses[k]);
    open.used = 0;
    open.count.fill(0);
  }
}

void AccessRecorder::drop_intervals() {
  for (auto& opens : warps_) opens.clear();
}

std::vector<AccessSite> AccessRecorder::report() const {
  // A header's name may be several strings, one per translation unit that includes it.
  std::map<std::tuple<std::string, int, std::string>, AccessSite> merged;
  for (const Site& site : sites_) {
    const std::string line = text(site.where);
    const std::string file = line.substr(0, line.rfind(':'));
    AccessSite& out = merged[{file, site.where.line, site.op}];
    out.file = file;
    out.line = site.where.line;
    out.op = site.op;
    // An asynchronous copy touches both memories; what it does not read it still writes.
    if (site.space == Space::kShared || out.accesses == 0) out.accesses += site.accesses;
    out.extra_wavefronts += site.extra_wavefronts;
    out.sectors += site.sectors.touched;
    out.ideal_sectors += site.sectors.ideal;
  }
  std::vector<AccessSite> sites;
  for (auto& [key, site] : merged) sites.push_back(site);
  return sites;
}

}  // namespace fae::cuda::emu

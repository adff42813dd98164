// Keys and values that lie in a cache which is longer than what is in it, or in pages of one.
#pragma once

#include <cstdint>

#include "core/mask.h"

namespace fae {

// Sequence b has page at(b, n) of a pool as its n-th.
struct PageTable {
  Integers entries;  // (batch, pages of a sequence); its stride is that of a row
  int64_t entry_stride = 0;
  int64_t page_size = 0;  // keys of a page
  int64_t pages = 0;      // in the pool

  FAE_HD bool present() const { return entries.present(); }
  // Within the pool whatever the table says.
  FAE_HD int64_t at(int64_t b, int64_t n) const {
    const int64_t place = b * entries.stride + n * entry_stride;
    const int64_t page = entries.is_int64 ? static_cast<const int64_t*>(entries.data)[place]
                                          : int64_t(static_cast<const int32_t*>(entries.data)[place]);
    return page < 0 ? 0 : page < pages ? page : pages - 1;
  }
};

struct KeyCache {
  int64_t capacity = -1;  // keys that one sequence has room for; -1: there is no cache
  Integers lengths;       // (batch): what is in it before the call, left padding included; none: `length`
  int64_t length = 0;
  int64_t added = 0;    // keys that the call itself puts behind those
  Integers left_pad;    // (batch): so many keys at the begin do not count; none: 0
  Integers batch;       // (batch): whose entry of the cache; none: its own
  int64_t entries = 0;  // of the cache; with pages: pages
  PageTable pages;      // none: an entry is one piece

  FAE_HD bool present() const { return capacity >= 0; }
  FAE_HD int64_t first(int64_t b) const { return left_pad.present() ? clamped(left_pad.at(b), capacity) : 0; }
  // Whose entry sequence b reads, within the cache whatever `batch` says.
  FAE_HD int64_t entry(int64_t b) const { return batch.present() ? clamped(batch.at(b), entries - 1) : b; }
  // Keys from the begin of the entry, before the call and with those that it adds.
  FAE_HD int64_t filled(int64_t b) const {
    return clamped(lengths.present() ? lengths.at(b) : length, capacity - added);
  }
  FAE_HD int64_t end(int64_t b) const { return filled(b) + added; }

 private:
  FAE_HD static int64_t clamped(int64_t n, int64_t most) {
    return n < 0 || most < 0 ? 0 : n < most ? n : most;
  }
};

}  // namespace fae

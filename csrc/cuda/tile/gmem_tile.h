// Tiles between global and shared memory.
#pragma once

#include "cuda/prim/cp_async.h"
#include "cuda/prim/global.h"
#include "cuda/tile/sequence.h"
#include "cuda/tile/smem_tile.h"

namespace fae::cuda {

// Begins to fill a tile with rows [0, row_count) and columns [column, column + kCols) of a
// source that has `columns` of them; what lies outside becomes 0. Complete for a thread
// after its next copy_async_wait, for the block after a barrier. `vector`: see VectorRows.
template <int kThreads, class T, int kRows, int kCols, class Rows>
FAE_DEVICE void load_tile(SmemTile<T, kRows, kCols> tile, const RowSource<const T>& source, const Rows& rows,
                          int row_count, int column, int columns, bool vector) {
  using Tile = SmemTile<T, kRows, kCols>;
  constexpr int kTotal = kRows * Tile::kChunks;
  if constexpr (kLooksUpRows<Rows>) {
    if (vector) {
      FAE_NO_UNROLL
      for (int index = thread_index(); index < kTotal; index += kThreads) {
        const int r = index / Tile::kChunks, chunk = index % Tile::kChunks;
        const int c = column + chunk * Tile::kChunk;
        const bool inside = r < row_count && c < columns;
        copy_async_16(tile.chunk(r, chunk), inside ? row_pointer(source, rows, r) + c : source.data, inside);
      }
      return;
    }
  } else if (vector) {
    // Whole rows of threads: one column of chunks a thread, and rows a constant stride apart.
    constexpr bool kRegular = kThreads % Tile::kChunks == 0 && kThreads / Tile::kChunks % 8 == 0;
    constexpr int kRowStep = kRegular ? kThreads / Tile::kChunks : 1;
    const int first = thread_index() / Tile::kChunks, chunk0 = thread_index() % Tile::kChunks;
    const LaneChunk dst0 = tile.lane_chunk(kRegular ? first : 0, kRegular ? chunk0 : 0);
    const bool plain = rows_are_regular(rows);
    const T* src0 = row_pointer(source, rows, first) + column + chunk0 * Tile::kChunk;
    const int64_t step = kRowStep * source.row_stride;
    FAE_UNROLL
    for (int i = 0; i < (kTotal + kThreads - 1) / kThreads; ++i) {
      const int index = i * kThreads + thread_index();
      if (kTotal % kThreads != 0 && index >= kTotal) break;
      const int r = kRegular ? first + i * kRowStep : index / Tile::kChunks;
      const int chunk = kRegular ? chunk0 : index % Tile::kChunks;
      const int c = column + chunk * Tile::kChunk;
      const bool inside = r < row_count && c < columns;
      const Smem<std::byte> dst = kRegular ? Tile::move(dst0, i * kRowStep, 0).at() : tile.chunk(r, chunk);
      const T* src = kRegular && plain ? src0 : row_pointer(source, rows, r) + c;
      src0 += step;
      copy_async_16(dst, inside ? src : source.data, inside);
    }
    return;
  }
  FAE_NO_UNROLL
  for (int index = thread_index(); index < kTotal; index += kThreads) {
    const int r = index / Tile::kChunks, chunk = index % Tile::kChunks;
    const int c = column + chunk * Tile::kChunk;
    const T* const row = r < row_count ? row_pointer(source, rows, r) : source.data;
    T values[Tile::kChunk];
    FAE_UNROLL
    for (int e = 0; e < Tile::kChunk; ++e) {
      values[e] = r < row_count && c + e < columns ? load_global(row + (c + e) * source.column_stride) : T{};
    }
    Vec16 bits;
    memcpy(&bits, values, 16);
    store_shared(tile.chunk(r, chunk).template as<Vec16>(), bits);
  }
}

// What slices of a tensor are loaded from: its rows, of so many columns. `vector`: see VectorRows.
template <class T>
struct Slices {
  RowSource<T> source;
  int columns;
  bool vector;
};

// Begins to fill a tile with keys or values [key, key + row_count) of a sequence; x: its K or V, whose pages
// are page_stride elements apart.
template <int kThreads, class T, int kRows, int kCols>
FAE_DEVICE void load_keys(SmemTile<T, kRows, kCols> tile, const Slices<const T>& x, int64_t page_stride,
                          const Problem& p, const SharedSequence<T>& sequence, int key, int row_count,
                          int column) {
  // Out of the way of all other calls.
  if (const PageTable& pages = p.cache.pages; __builtin_expect(pages.present(), false)) {
    const PagedRows rows{pages, sequence.batch(), sequence.first_key() + key, page_stride};
    load_tile<kThreads>(tile, x.source, rows, row_count, column, x.columns, x.vector);
  } else {
    load_tile<kThreads>(tile, x.source, PlainRows{key}, row_count, column, x.columns, x.vector);
  }
}

// Writes rows [0, row_count) and columns [0, columns - column) of a tile that this warp has
// filled (with a warp barrier since): rows first_row + [0, kRowsOfWarp) of the tile.
template <int kRowsOfWarp, class T, int kRows, int kCols, class Rows>
FAE_DEVICE void store_rows(SmemTile<T, kRows, kCols> tile, const RowSource<T>& target, const Rows& rows,
                           int first_row, int row_count, int column, int columns, bool vector) {
  using Tile = SmemTile<T, kRows, kCols>;
  constexpr int kSteps = kRowsOfWarp * Tile::kChunks / kWarpSize;
  // store(row, c, bits) for the chunks of this lane that exist, the i-th of them now.
  const auto store_chunk = [&](int i, auto&& store) {
    const int index = i * kWarpSize + lane_index();
    const int r = first_row + index / Tile::kChunks, chunk = index % Tile::kChunks;
    const int c = column + chunk * Tile::kChunk;
    if (r >= row_count || c >= columns) return;
    store(row_pointer(target, rows, r), c, load_shared(tile.chunk(r, chunk).template as<Vec16>()));
  };
  if (vector) {
    FAE_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      store_chunk(i,
                  [](T* row, int c, Vec16 bits) { store_global(reinterpret_cast<Vec16*>(row + c), bits); });
    }
    return;
  }
  FAE_NO_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    store_chunk(i, [&](T* row, int c, Vec16 bits) {
      T values[Tile::kChunk];
      memcpy(values, &bits, 16);
      FAE_UNROLL
      for (int e = 0; e < Tile::kChunk; ++e) {
        if (c + e < columns) store_global(row + (c + e) * target.column_stride, values[e]);
      }
    });
  }
}

}  // namespace fae::cuda

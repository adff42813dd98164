// Which tensor rows a tile consists of.
#pragma once

#include "core/problem.h"
#include "cuda/prim/device.h"

namespace fae::cuda {

// Rows, queries and keys are counted in 32 bits (the planner sees to that), elements in 64.

// Packed query rows from a tile's first on (see Problem::packed_rows): row r of the tile is
// query `query_begin + (remainder + r) / group` of head `(remainder + r) % group`.
struct PackedRows {
  int query_begin = 0;
  int remainder = 0;
  int group = 1;

  FAE_DEVICE PackedRows() {}
  FAE_DEVICE PackedRows(int first_row, int64_t heads_per_group) : group(int(heads_per_group)) {
    query_begin = group == 1 ? first_row : first_row / group;
    remainder = first_row - query_begin * group;
  }
  FAE_DEVICE int query(int r) const {
    return query_begin + (group == 1 ? r : int(unsigned(remainder + r) / unsigned(group)));
  }
  FAE_DEVICE int head(int r) const { return group == 1 ? 0 : int(unsigned(remainder + r) % unsigned(group)); }
};

// Rows of one head (keys, values) or of a group of heads (queries, outputs).
template <class T>
struct RowSource {
  T* data = nullptr;  // row 0 of a sequence, column 0 of the first head
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t column_stride = 0;

  FAE_DEVICE RowSource() {}
  FAE_DEVICE RowSource(const View4& view, int64_t batch, int64_t head, int64_t first_row)
      : data(static_cast<T*>(view.data) + view.offset(batch, head, first_row)),
        row_stride(view.stride[2]),
        head_stride(view.stride[1]),
        column_stride(view.stride[3]) {}

  FAE_DEVICE RowSource(const View4& view, T* first)
      : data(first), row_stride(view.stride[2]), head_stride(view.stride[1]), column_stride(view.stride[3]) {}

  FAE_DEVICE T* row(int64_t row) const { return data + row * row_stride; }
  FAE_DEVICE T* row(const PackedRows& rows, int r) const {
    return row(rows.query(r)) + rows.head(r) * head_stride;
  }
};

// Rows first, first + 1, ... of one head.
struct PlainRows { int first = 0; };

// The same of an entry in pages, of a source that begins with page 0.
struct PagedRows {
  const PageTable& pages;
  int entry;  // of the table
  int first;
  int64_t page_stride;
};

template <class T>
FAE_DEVICE T* row_pointer(const RowSource<T>& source, const PackedRows& rows, int r) {
  return source.row(rows, r);
}
template <class T>
FAE_DEVICE T* row_pointer(const RowSource<T>& source, const PlainRows& rows, int r) {
  return source.row(rows.first + r);
}
template <class T>
FAE_DEVICE T* row_pointer(const RowSource<T>& source, const PagedRows& rows, int r) {
  const unsigned row = unsigned(rows.first + r), size = unsigned(rows.pages.page_size);
  return source.row(row % size) + rows.pages.at(rows.entry, row / size) * rows.page_stride;
}

// Whether neighbouring rows are a row stride apart.
FAE_DEVICE bool rows_are_regular(const PackedRows& rows) { return rows.group == 1; }
FAE_DEVICE bool rows_are_regular(const PlainRows&) { return true; }

// Rows that are looked up one by one: see load_tile.
template <class Rows> constexpr bool kLooksUpRows = false;
template <> constexpr bool kLooksUpRows<PagedRows> = true;

}  // namespace fae::cuda

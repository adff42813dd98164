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
  T* data = nullptr;  // row 0, column 0 of the first head
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t column_stride = 0;

  FAE_DEVICE RowSource() {}
  FAE_DEVICE RowSource(const View4& view, int64_t batch, int64_t head)
      : data(static_cast<T*>(view.data) + view.offset(batch, head, 0)),
        row_stride(view.stride[2]),
        head_stride(view.stride[1]),
        column_stride(view.stride[3]) {}

  FAE_DEVICE T* row(int64_t row) const { return data + row * row_stride; }
  FAE_DEVICE T* row(const PackedRows& rows, int r) const {
    return row(rows.query(r)) + rows.head(r) * head_stride;
  }
};

// Rows first, first + 1, ... of one head.
struct PlainRows { int first = 0; };

template <class T>
FAE_DEVICE T* row_pointer(const RowSource<T>& source, const PackedRows& rows, int r) {
  return source.row(rows, r);
}
template <class T>
FAE_DEVICE T* row_pointer(const RowSource<T>& source, const PlainRows& rows, int r) {
  return source.row(rows.first + r);
}

// Whether neighbouring rows are a row stride apart.
FAE_DEVICE bool rows_are_regular(const PackedRows& rows) { return rows.group == 1; }
FAE_DEVICE bool rows_are_regular(const PlainRows&) { return true; }

}  // namespace fae::cuda

// Products C = A B on packed panels: the register tile that every op shares, packing from any
// stride and storage, and a blocked product for large matrices.
//
// The scheme is that of K. Goto and R. van de Geijn, "Anatomy of high-performance matrix
// multiplication" (2008), in the form of BLIS: a tile of C stays in registers while a panel of B,
// kPanelVecs registers wide, streams past from the first-level cache.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace pykernels {

// A panel of B is this many registers wide.
constexpr int kPanelVecs = 2;

template <class T>
constexpr int kPanel = kPanelVecs * lanes<T>;

// A tile has at most this many rows: its accumulators, one panel's registers of B and one broadcast
// of A fill the register file (6 x 2 + 2 + 1 of 16, 14 x 2 + 2 + 1 of 32).
constexpr int kTileRows = kVecRegisters == 32 ? 14 : 6;

// And at least so many, where rows can be cut that way. With AVX2 the fewer rows a tile has the
// fewer sums it has to keep two units busy, and a full one is the fastest. With AVX-512 so is one
// of 14 or of up to 10: the addresses of 11 to 13 rows do not fit the general registers, and GCC 12
// fetches them from vector registers.
constexpr int kLeastRows = kVecRegisters == 32 ? 9 : 4;

// Depth of one blocked step: a sum of 300 terms, common among embeddings, is one. With AVX2 the
// panel of B and the tile of A, which meet in the first-level cache, take 28 KB of its 32; with
// AVX-512, where the panel alone has 40 KB and streams from the second level, shallower steps were
// no faster. Shorter where each term rounds twice: then a sum within it is one chain.
template <class T>
constexpr int64_t kDepth = (kFused ? 1280 : 512) / sizeof(T);

// Rows of A packed at a time: with kDepth, 180 KB with AVX2 and 280 KB with AVX-512 that stay in
// the second-level cache.
constexpr int64_t kBlockRows = kTileRows * (kVecRegisters == 32 ? 16 : 24);

// Columns of B packed at a time.
constexpr int64_t kBlockColumns = 3072;

// A matrix of any strides, stored as S.
template <class S>
struct View {
  const S* data;
  int64_t row, column;  // strides in elements

  View at(int64_t i, int64_t j) const { return {data + i * row + j * column, row, column}; }
  View transposed() const { return {data, column, row}; }
};

// ---- the register tile --------------------------------------------------------------------------

// C (+)= A B for one tile: `rows` rows, at most kTileRows, by `panels` panels, at most
// panels_of(rows); see gemm.cpp.
//
//   a: element (i, k) at a[i * a_row + k * a_step]
//   b: row k of panel p at b[p * b_panel + k * b_step], kPanel values
//   c: row i at c[i * c_row], panels * kPanel values; read only with `accumulate`
//
// Or for several `tiles` one below the other, `a_tile` values apart in a, which spares them the
// time from one call to the next.
template <class T>
void multiply_tile(int64_t rows, int64_t panels, int64_t depth, const T* a, int64_t a_row,
                   int64_t a_step, const T* b, int64_t b_panel, int64_t b_step, bool accumulate,
                   T* c, int64_t c_row, int64_t tiles = 1, int64_t a_tile = 0);

// How many panels a tile of `rows` rows may take: a power of two, at most four. Few rows take
// several, since a multiply-add takes four cycles and eight of them in flight keep two units busy.
constexpr int64_t panels_of(int64_t rows) {
  return kTileRows / rows >= 4 ? 4 : kTileRows / rows >= 2 ? 2 : 1;
}

// Values in the largest tile.
template <class T>
constexpr int64_t kTileSize = kTileRows * kPanel<T>;

// `rows` cut into as few tiles as can be: full ones first, then even ones of no fewer than
// kLeastRows where there are so many. Runs body(row, tiles, height) for those of each height.
template <class Body>
PK_INLINE void for_each_tile_height(int64_t rows, const Body& body) {
  if (rows == 0) return;
  if (rows <= kTileRows) return body(0, 1, rows);  // spared the divisions
  const int64_t tiles = ceil_div(rows, kTileRows);
  const int64_t even = std::min(tiles, ceil_div(tiles * kTileRows - rows, kTileRows - kLeastRows));
  const int64_t full = tiles - even, rest = rows - full * kTileRows;
  if (full > 0) body(0, full, kTileRows);
  if (even == 0) return;
  const int64_t height = rest / even, taller = rest - even * height;  // tiles of one row more
  if (taller > 0) body(full * kTileRows, taller, height + 1);
  body(full * kTileRows + taller * (height + 1), even - taller, height);
}

// And body(row, count) for each.
template <class Body>
PK_INLINE void for_each_tile_row(int64_t rows, const Body& body) {
  for_each_tile_height(rows, [&](int64_t row, int64_t tiles, int64_t height) {
    for (int64_t t = 0; t < tiles; ++t) body(row + t * height, height);
  });
}

// Runs body(row, tiles, height, panel, panels) over tiles that cover rows x panels, `tiles` of them
// one below the other, `backwards` from the last panel. Panels are outside: a panel of B stays in
// the first-level cache while the rows of A go by.
template <class Body>
PK_INLINE void for_each_tile_column(Range rows, Range panels, const Body& body,
                                    bool backwards = false) {
  if (rows.size() == 0) return;
  const int64_t group = rows.size() > kTileRows ? 1 : panels_of(rows.size());
  for (int64_t done = 0; done < panels.size();) {
    int64_t count = group;
    while (done + count > panels.size()) count /= 2;
    const int64_t panel = backwards ? panels.end - done - count : panels.begin + done;
    for_each_tile_height(rows.size(), [&](int64_t row, int64_t tiles, int64_t height) {
      body(rows.begin + row, tiles, height, panel, count);
    });
    done += count;
  }
}

// And body(row, rows, panel, panels) for each tile.
template <class Body>
PK_INLINE void for_each_tile(Range rows, Range panels, const Body& body) {
  for_each_tile_column(
      rows, panels, [&](int64_t row, int64_t tiles, int64_t height, int64_t panel, int64_t count) {
        for (int64_t t = 0; t < tiles; ++t) body(row + t * height, height, panel, count);
      });
}

// ---- packing ------------------------------------------------------------------------------------

// to[k * to_row + j] = from(j, k) for j < count and k < depth, where count <= kGroups * lanes and
// the values of one j are contiguous. Writes whole registers: up to lanes - 1 values past each
// row's end, which the next row then overwrites, and past the end of the last.
template <class T, int kGroups, class S>
void transpose_copy(const S* from, int64_t from_row, int64_t count, int64_t depth, T* to,
                    int64_t to_row) {
  constexpr int n = lanes<T>;
  int64_t k = 0;
  for (; k + n <= depth; k += n) {
    vec<T> square[kGroups][n];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j)
        square[g][j] = g * n + j < count ? load(from + (g * n + j) * from_row + k) : vec<T>{};
      transpose(square[g]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
        if (g * n < count) store(to + (k + i) * to_row + g * n, square[g][i]);
  }
  for (; k < depth; ++k)
    for (int64_t j = 0; j < count; ++j) to[k * to_row + j] = widen(from[j * from_row + k]);
}

// The panel of B at columns [0, columns) of `from`: [depth, kPanel], zeros past the last column.
template <class T, class S>
void pack_panel(View<S> from, int64_t depth, int64_t columns, T* to) {
  constexpr int width = kPanel<T>;
  if (from.row == 1) {
    if (columns < width) std::memset(static_cast<void*>(to), 0, depth * width * sizeof(T));
    return transpose_copy<T, kPanelVecs>(from.data, from.column, columns, depth, to, width);
  }
  for (int64_t k = 0; k < depth; ++k, to += width, from.data += from.row) {
    if (from.column == 1) {
#pragma GCC unroll 4
      for (int j = 0; j < width; j += lanes<T>)
        store(to + j, j < columns ? load_n(from.data + j, columns - j) : vec<T>{});
    } else {
      for (int64_t j = 0; j < width; ++j)
        to[j] = j < columns ? widen(from.data[j * from.column]) : T(0);
    }
  }
}

// Panels packed side by side from rows that lie contiguous: their reads are several cache lines
// long, where those of one panel would be single lines a whole row apart.
constexpr int kPanelsAtOnce = 4;

// kPanelsAtOnce whole panels, whose rows of `from` are contiguous.
template <class T, class S>
void copy_panels(View<S> from, int64_t depth, T* to) {
  constexpr int width = kPanel<T>;
  for (int64_t k = 0; k < depth; ++k, to += width, from.data += from.row)
#pragma GCC unroll 4
    for (int p = 0; p < kPanelsAtOnce; ++p)
#pragma GCC unroll 4
      for (int j = 0; j < width; j += lanes<T>)
        store(to + p * depth * width + j, load(from.data + p * width + j));
}

// Values that pack_panels writes.
template <class T>
PK_INLINE int64_t packed_size(int64_t depth, int64_t columns) {
  return ceil_div(columns, kPanel<T>) * depth * kPanel<T>;
}

// All of B [depth, columns] as panels [columns / kPanel][depth, kPanel]; this thread's share.
template <class T, class S>
void pack_panels(const Team& team, View<S> from, int64_t depth, int64_t columns, T* to) {
  constexpr int width = kPanel<T>;
  const Range panels = team.share(ceil_div(columns, width));
  int64_t p = panels.begin;
  if (from.column == 1)
    for (; p + kPanelsAtOnce <= panels.end && (p + kPanelsAtOnce) * width <= columns;
         p += kPanelsAtOnce)
      copy_panels(from.at(0, p * width), depth, to + p * depth * width);
  for (; p < panels.end; ++p)
    pack_panel(from.at(0, p * width), depth, std::min<int64_t>(width, columns - p * width),
               to + p * depth * width);
}

// Rows [0, rows) of A, cut into the tiles of for_each_tile: [tile][depth, rows of the tile], the
// tile at `row` at to + row * depth. Writes up to a register past the end.
template <class T, class S>
void pack_rows(View<S> from, int64_t rows, int64_t depth, T* to) {
  constexpr int groups = (kTileRows + lanes<T> - 1) / lanes<T>;
  for_each_tile_row(rows, [&](int64_t row, int64_t height) {
    const View<S> tile = from.at(row, 0);
    T* const packed = to + row * depth;
    if (tile.column == 1) {
      transpose_copy<T, groups>(tile.data, tile.row, height, depth, packed, height);
    } else if (tile.row == 1 && row + round_up(height, lanes<T>) <= rows) {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < height; r += lanes<T>)
          store(packed + k * height + r, load(tile.data + k * tile.column + r));
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < height; ++r)
          packed[k * height + r] = widen(tile.data[r * tile.row + k * tile.column]);
    }
  });
}

// ---- the blocked product ------------------------------------------------------------------------

// C [m, n] = A [m, k] B [k, n].
struct ProductSize {
  int64_t m, n, k;
};

// C = A B, or with `accumulate` C + A B; C is row-major with row stride c_row. The team splits C,
// so no thread waits for another, and each element is summed in one order whatever the number of
// threads.
template <class T>
class Gemm {
 public:
  // For products with at most so many columns and so long sums: scratch is taken here, as the team
  // must not allocate.
  Gemm(int threads, int64_t n, int64_t k)
      : columns_(std::min(round_up(n, kPanel<T>), kBlockColumns)), depth_(std::min(k, kDepth<T>)),
        per_thread_(columns_ * depth_ + kBlockRows * depth_ + lanes<T>),
        scratch_(threads * per_thread_) {}

  template <class SA, class SB>
  void run(const Team& team, ProductSize size, View<SA> a, View<SB> b, bool accumulate, T* c,
           int64_t c_row) const {
    const Grid grid = choose_grid(team.size, size);
    if (team.rank >= grid.rows * grid.columns) return;
    const Range rows = split(size.m, kTileRows, grid.rows, team.rank / grid.columns);
    const Range columns = split(size.n, kPanel<T>, grid.columns, team.rank % grid.columns);
    if (rows.size() == 0 || columns.size() == 0) return;  // `a` and `b` may then be null
    T* const packed_b = scratch_.get() + team.rank * per_thread_;
    T* const packed_a = packed_b + columns_ * depth_;
    for (int64_t j = columns.begin; j < columns.end; j += columns_) {
      const int64_t width = std::min(columns_, columns.end - j);
      if (size.k == 0 && !accumulate)
        for (int64_t i = rows.begin; i < rows.end; ++i) std::fill_n(c + i * c_row + j, width, T(0));
      for (int64_t k = 0; k < size.k; k += depth_) {
        const int64_t depth = std::min(depth_, size.k - k);
        pack_panels<T>(Team{0, 1, nullptr}, b.at(k, j), depth, width, packed_b);
        for (int64_t i = rows.begin; i < rows.end; i += kBlockRows) {
          const int64_t height = std::min(kBlockRows, rows.end - i);
          pack_rows<T>(a.at(i, k), height, depth, packed_a);
          block(height, width, depth, packed_a, packed_b, accumulate || k > 0, c + i * c_row + j,
                c_row);
        }
      }
    }
  }

 private:
  struct Grid {
    int rows, columns;
  };

  // The split of the team that packs least: a thread packs its rows of A and its columns of B.
  static Grid choose_grid(int threads, ProductSize size) {
    Grid best{1, 1};
    double least = -1;
    for (int rows = 1; rows <= threads; ++rows) {
      const int columns = threads / rows;
      const double tiles = double(ceil_div(ceil_div(size.m, kTileRows), rows)) *
                           double(ceil_div(ceil_div(size.n, kPanel<T>), columns));
      const double work =
          tiles * kTileRows * kPanel<T> + 32. * (double(size.m) / rows + double(size.n) / columns);
      if (least < 0 || work < least) {
        least = work;
        best = {rows, columns};
      }
    }
    return best;
  }

  static void block(int64_t rows, int64_t columns, int64_t depth, const T* a, const T* b,
                    bool accumulate, T* c, int64_t c_row) {
    constexpr int64_t width = kPanel<T>;
    alignas(kCacheLine) T edge[kTileSize<T>];
    const Range panels{0, ceil_div(columns, width)};
    for_each_tile({0, rows}, panels, [&](int64_t row, int64_t count, int64_t panel, int64_t wide) {
      const int64_t first = panel * width;
      const int64_t tile_row = wide * width;
      const int64_t valid = std::min(tile_row, columns - first);
      T* const to = c + row * c_row + first;
      const bool whole = valid == tile_row;
      for (int64_t r = 0; r < count && accumulate && !whole; ++r)
        for (int64_t x = 0; x < tile_row; x += lanes<T>)
          store(edge + r * tile_row + x,
                x < valid ? load_n(to + r * c_row + x, valid - x) : vec<T>{});
      multiply_tile(count, wide, depth, a + row * depth, 1, count, b + first * depth, depth * width,
                    width, accumulate, whole ? to : edge, whole ? c_row : tile_row);
      for (int64_t r = 0; r < count && !whole; ++r)
        for (int64_t x = 0; x < valid; x += lanes<T>)
          store_n(to + r * c_row + x, load(edge + r * tile_row + x), valid - x);
    });
  }

  const int64_t columns_, depth_, per_thread_;
  const Scratch<T> scratch_;
};

}  // namespace pykernels

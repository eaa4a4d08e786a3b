// The register tile: the only loop in which multiply-adds run.
#include "gemm.h"

#include <algorithm>
#include <utility>

namespace pykernels {
namespace {

// Terms that are added in one chain. The error of a chain grows with its length: that of two half
// as long, added up, is less.
constexpr int64_t kTileChain = 160;

template <class T, int ROWS, int PANELS>
void run(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_panel,
         int64_t b_step, bool accumulate, T* c, int64_t c_row, int64_t tiles, int64_t a_tile) {
  constexpr int columns = PANELS * kPanelVecs;
  for (int64_t tile = 0; tile < tiles; ++tile, a += a_tile, c += ROWS * c_row) {
    const T* left_at = a;
    const T* right_at = b;
    int64_t k = 0;
    do {
      vec<T> sum[ROWS][columns];
#pragma GCC unroll 32
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 32
        for (int j = 0; j < columns; ++j) sum[i][j] = vec<T>{};
      const bool add = accumulate || k > 0;
      for (const int64_t end = std::min(depth, k + kTileChain); k < end;
           ++k, left_at += a_step, right_at += b_step) {
        vec<T> right[columns];
#pragma GCC unroll 32
        for (int j = 0; j < columns; ++j)
          right[j] = load(right_at + j / kPanelVecs * b_panel + j % kPanelVecs * lanes<T>);
#pragma GCC unroll 32
        for (int i = 0; i < ROWS; ++i) {
          const vec<T> left = broadcast(left_at[i * a_row]);
#pragma GCC unroll 32
          for (int j = 0; j < columns; ++j) sum[i][j] += left * right[j];
        }
      }
#pragma GCC unroll 32
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 32
        for (int j = 0; j < columns; ++j) {
          T* const to = c + i * c_row + j * lanes<T>;
          store(to, add ? load(to) + sum[i][j] : sum[i][j]);
        }
    } while (k < depth);
  }
}

template <class T>
using Run = void (*)(int64_t, const T*, int64_t, int64_t, const T*, int64_t, int64_t, bool, T*,
                     int64_t, int64_t, int64_t);

// One row of the table of tiles: 1, 2 and 4 panels as far as panels_of allows.
template <class T, int ROWS>
constexpr Run<T> variant(int log_panels) {
  if constexpr (panels_of(ROWS) >= 4)
    if (log_panels == 2) return run<T, ROWS, 4>;
  if constexpr (panels_of(ROWS) >= 2)
    if (log_panels == 1) return run<T, ROWS, 2>;
  return run<T, ROWS, 1>;
}

template <class T>
struct Table {
  Run<T> tile[kTileRows][3];
};

template <class T, int... I>
constexpr Table<T> make_table(std::integer_sequence<int, I...>) {
  return {{{variant<T, I + 1>(0), variant<T, I + 1>(1), variant<T, I + 1>(2)}...}};
}

template <class T>
constexpr Table<T> kTable = make_table<T>(std::make_integer_sequence<int, kTileRows>{});

}  // namespace

template <class T>
void multiply_tile(int64_t rows, int64_t panels, int64_t depth, const T* a, int64_t a_row,
                   int64_t a_step, const T* b, int64_t b_panel, int64_t b_step, bool accumulate,
                   T* c, int64_t c_row, int64_t tiles, int64_t a_tile) {
  kTable<T>.tile[rows - 1][panels >> 1](depth, a, a_row, a_step, b, b_panel, b_step, accumulate, c,
                                        c_row, tiles, a_tile);
}

template void multiply_tile<float>(int64_t, int64_t, int64_t, const float*, int64_t, int64_t,
                                   const float*, int64_t, int64_t, bool, float*, int64_t, int64_t,
                                   int64_t);
template void multiply_tile<double>(int64_t, int64_t, int64_t, const double*, int64_t, int64_t,
                                    const double*, int64_t, int64_t, bool, double*, int64_t,
                                    int64_t, int64_t);

}  // namespace pykernels

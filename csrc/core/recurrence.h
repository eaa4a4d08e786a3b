// The time loop of every recurrent layer, forward and backward through time.
//
// Either way a step is one small product, then the cell on its result, tile by tile:
//
//   forward    h_{t-1} [B, H]        x  W_hh^T [H, G H]   then  h_t     = cell(...)
//   backward   delta_{t+1} [B, G H]  x  W_hh   [G H, H]   then  delta_t = cell'(dh_t)
//
// so one loop serves both: Cell says where a step's left-hand side is and what becomes of a tile.
#pragma once

#include "gemm.h"

namespace pykernels {

// Multiply-adds in a step from which two threads beat one: half of them take as long as a meeting.
constexpr int64_t kShareableStep = 32768;

// Runs `steps` steps. The right-hand side [depth, columns] is packed in panels, once for all steps.
//
//   const T* cell.left(step)     the left-hand side [rows, depth], row-major; nullptr for zeros
//   cell.finish(step, row, column, count, register)
//                                one register of the product, of which `count` lanes are valid
//
// With rows for every thread the team splits the rows and no thread waits for another; with few
// rows it splits the columns, and meets after every step. A step too small to pay for the meeting
// runs on one thread.
template <class T, class Cell>
void run_recurrence(const Team& team, int64_t steps, int64_t rows, int64_t depth, int64_t columns,
                    const T* packed, const Cell& cell) {
  constexpr int width = kPanel<T>;
  const int64_t panels = ceil_div(columns, width);
  const bool alone = rows * depth * columns < kShareableStep;
  const bool split_rows = !alone && (rows >= team.size * (kTileRows / 2) || panels < team.size);
  if (alone && team.rank > 0) return;
  const Range my_rows = split_rows ? team.share(rows) : Range{0, rows};
  const Range my_panels = split_rows || alone ? Range{0, panels} : team.share(panels);
  alignas(kCacheLine) T tile[kTileSize<T>];
  for (int64_t step = 0; step < steps; ++step) {
    const T* const left = cell.left(step);
    for_each_tile(my_rows, my_panels, [&](int64_t row, int64_t count, int64_t panel, int64_t wide) {
      const int64_t first = panel * width;
      const int64_t tile_row = wide * width;
      multiply_tile(count, wide, left ? depth : 0, left ? left + row * depth : nullptr, depth, 1,
                    packed + first * depth, depth * width, width, false, tile, tile_row);
      const int64_t valid = std::min(tile_row, columns - first);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t x = 0; x < valid; x += lanes<T>)
          cell.finish(step, row + r, first + x, std::min<int64_t>(lanes<T>, valid - x),
                      load(tile + r * tile_row + x));
    });
    if (!split_rows && !alone) team.wait();
  }
}

}  // namespace pykernels

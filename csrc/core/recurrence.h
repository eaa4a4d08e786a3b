// The time loop of every recurrent layer, forward and backward through time.
//
// Either way a step is one small product, then the cell on its result, a few rows and units at a
// time, while it is in the first level of cache:
//
//   forward    h_{t-1} [B, R]         x  W_hh^T [R, G H]   then  h_t     = cell(...)
//   backward   delta_{t+1} [B, G H]   x  W_hh   [G H, R]   then  delta_t = cell'(dh_t)
//
// W is packed once for all steps, so that the G gates of a unit lie beside each other: block b of
// kPanel units is G panels, one a gate.
#pragma once

#include "gemm.h"

namespace pykernels {

// Multiply-adds in a step from which two threads beat one: half of them take as long as a meeting.
constexpr int64_t kShareableStep = 8192;

// Multiply-adds a nanosecond that a thread with more to do than others must make, or count as one
// without a core: a tenth of what a core with AVX2 makes.
constexpr int64_t kSlowestPace = 5;

// Rows of a step whose products are computed before the cell runs on them.
constexpr int64_t kStepRows = 8 * kTileRows;

// The order of a walk through the steps of a batch of sequences, and where their rows are. Rows lie
// as in a PackedSequence: those of one time step side by side, longest sequence first, so that the
// sequences that reach a step are its first rows. In a dense batch all of them do.
struct Walk {
  int64_t T, B;
  const int64_t* offsets;  // [T + 1]: the first row of each time step; nullptr in a dense batch
  bool reverse;            // from time T - 1 to 0

  int64_t time(int64_t step) const { return reverse ? T - 1 - step : step; }
  int64_t start(int64_t time) const { return offsets ? offsets[time] : time * B; }
  int64_t first(int64_t step) const { return start(time(step)); }
  int64_t rows(int64_t step) const { return start(time(step) + 1) - first(step); }
  // Rows of a step whose sequences were in the step before. The others begin with this step.
  int64_t carried(int64_t step) const {
    return step == 0 ? 0 : std::min(rows(step), rows(step - 1));
  }
  int64_t total() const { return start(T); }
  // All rows of steps [begin, end).
  Range span(int64_t begin, int64_t end) const {
    if (begin == end) return {0, 0};
    return reverse ? Range{start(T - end), start(T - begin)} : Range{start(begin), start(end)};
  }
  Walk back() const { return {T, B, offsets, !reverse}; }
};

// How a team shares the steps of a walk. With rows for every thread in a dense batch the team
// splits the rows and no thread waits for another; else it splits the units, and meets after every
// product. Steps too small to pay for the meeting run on one thread, and so do the rest of the
// steps once threads turn out to lack cores: a meeting may then take as long as a time slice.
class StepShare {
 public:
  // Of steps that each take a product [rows, depth] x [depth, columns], of which a thread takes
  // whole blocks of `block` columns. The team has just met.
  StepShare(const Team& team, const Walk& walk, int64_t depth, int64_t columns, int64_t block)
      : team_(team), walk_(walk),
        small_(team.size == 1 || walk.B * depth * columns < kShareableStep),
        by_rows_(!small_ && !walk.offsets && walk.B >= team.size * (kTileRows / 2)),
        // Shares differ by a block at the most.
        patience_(Barrier::kLong + std::chrono::nanoseconds(walk.B * depth * block / kSlowestPace)),
        alone_(small_ || (!by_rows_ && team.barrier->crowded())) {}

  // Whether one thread runs every step because they are small, not for want of cores.
  bool small() const { return small_; }
  bool by_rows() const { return by_rows_; }
  // Whether this thread has nothing to do, now and in the steps to come.
  bool idle() const { return alone_ && team_.rank > 0; }
  Range rows(int64_t step) const {
    return by_rows_ ? team_.share(walk_.B) : Range{0, walk_.rows(step)};
  }
  Range all_rows() const { return by_rows_ ? team_.share(walk_.B) : Range{0, walk_.B}; }
  Range blocks(int64_t count) const {
    return alone_ || by_rows_ ? Range{0, count} : team_.share(count);
  }
  // After a product that other threads' next product reads.
  void meet() {
    if (alone_ || by_rows_) return;
    team_.barrier->wait(team_.size, patience_);
    alone_ = team_.barrier->crowded();
  }

 private:
  const Team& team_;
  const Walk& walk_;
  const bool small_, by_rows_;
  const std::chrono::nanoseconds patience_;
  bool alone_;
};

// Values that pack_gates writes for `gates` gates of `units` units.
template <class T>
PK_INLINE int64_t gates_size(int64_t gates, int64_t units, int64_t depth) {
  return ceil_div(units, kPanel<T>) * gates * depth * kPanel<T>;
}

// Where the first gate of a unit is in a row of gates in blocks; the next is kPanel further on.
template <class T>
PK_INLINE int64_t gate_at(int64_t gates, int64_t unit) {
  const int64_t in_block = unit & (kPanel<T> - 1);
  return (unit - in_block) * gates + in_block;
}

// Values from one row of kept gates to the next: as many in every build, whose blocks differ, since
// who makes room for them may not know which one will run (pykernels/cpp/_recurrent.py).
template <class T>
PK_INLINE int64_t kept_row(int64_t gates, int64_t units) {
  constexpr int64_t widest = 128 / sizeof(T);
  static_assert(widest % kPanel<T> == 0);
  return ceil_div(units, widest) * gates * widest;
}

// Where the first gate of a unit is in one of many rows of kept gates.
template <class T>
PK_INLINE int64_t gate_at(int64_t gates, int64_t units, int64_t row, int64_t unit) {
  return row * kept_row<T>(gates, units) + gate_at<T>(gates, unit);
}

// W^T for w [gates * units, depth] of any strides, in blocks of units; this thread's share.
template <class T, class S>
void pack_gates(const Team& team, View<S> w, int64_t gates, int64_t units, int64_t depth, T* to) {
  constexpr int64_t width = kPanel<T>;
  const Range blocks = team.share(ceil_div(units, width));
  for (int64_t block = blocks.begin; block < blocks.end; ++block)
    for (int64_t gate = 0; gate < gates; ++gate)
      pack_panel<T>(w.at(gate * units + block * width, 0).transposed(), depth,
                    std::min(width, units - block * width),
                    to + (block * gates + gate) * depth * width);
}

// Runs body(row, unit, count, product) on every panel of units in a tile of products. A call for
// each would cost as much as what it does, so all in it is inlined; and `body` is a copy, which the
// compiler knows that nothing written through a pointer can change.
template <class T, int kGates, class Body>
__attribute__((flatten)) void finish_tile(Range rows, Range blocks, int64_t units, T* product,
                                          const Body body) {
  constexpr int64_t width = kPanel<T>;
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for (int64_t block = blocks.begin; block < blocks.end; ++block, product += kGates * width)
      body(row, block * width, std::min(width, units - block * width), product);
}

// left [rows, depth] times the packed gates of some blocks, then for each of `finish`, in turn
//
//   finish(row, unit, count, product)    on one panel of units, of which `count` are valid; that
//                                        of gate g is at product + g * kPanel
//
// over a tile of them before the next: where a cell is a long chain of operations, its parts are
// short ones, and the processor reaches far enough ahead to run several side by side. Before the
// products of some units fetch(row, unit) for each panel of them: what finish will read may lie a
// page apart from row to row, where the processor does not fetch ahead by itself.
//
// `left` is nullptr for zeros; its rows are `left_row` apart. `backwards` begins with the last
// units. Where every other step does, it finds in the cache what the step before has read last;
// where all begin with the same of more weights than a cache holds, they find none.
template <class T, int kGates, class Fetch, class... Finish>
PK_INLINE void multiply_gates(Range rows, Range blocks, int64_t units, int64_t depth, const T* left,
                              int64_t left_row, const T* packed, bool backwards, const Fetch& fetch,
                              const Finish&... finish) {
  constexpr int64_t width = kPanel<T>;
  alignas(kCacheLine) T tile[kStepRows * kGates * width];
  if (!left) depth = 0;
  const int64_t panel_size = depth * width;
  for (int64_t row = rows.begin; row < rows.end; row += kStepRows) {
    const int64_t count = std::min(kStepRows, rows.end - row);
    // Few rows take several blocks at a time, as far as `tile` has room: longer runs of products,
    // and of cells.
    const int64_t group = std::min(panels_of(1), kStepRows / count);
    for (int64_t done = 0; done < blocks.size(); done += group) {
      const int64_t wide = std::min(group, blocks.size() - done);
      const int64_t block = backwards ? blocks.end - done - wide : blocks.begin + done;
      const int64_t tile_row = wide * kGates * width;
      const T* const right = packed + block * kGates * panel_size;
      for (int64_t r = 0; r < count; ++r)
        for (int64_t b = 0; b < wide; ++b) fetch(row + r, (block + b) * width);
      for (int64_t k = 0; k == 0 || k < depth; k += kDepth<T>)
        for_each_tile_column(
            {0, count}, {0, wide * kGates},
            [&](int64_t r, int64_t tiles, int64_t height, int64_t panel, int64_t panels) {
              multiply_tile(height, panels, std::min(kDepth<T>, depth - k),
                            left ? left + (row + r) * left_row + k : nullptr, left_row, 1,
                            right + panel * panel_size + k * width, panel_size, width, k > 0,
                            tile + r * tile_row + panel * width, tile_row, tiles,
                            height * left_row);
            },
            backwards);
      (finish_tile<T, kGates>({row, row + count}, {block, block + wide}, units, tile, finish), ...);
    }
  }
}

}  // namespace pykernels

// Rows of a matrix asked for before they are read or written.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace pykernels {

// Asks for rows all at once: what is packed takes a part of each, too far apart for the processor
// to fetch ahead by itself.
template <class S>
void fetch_rows(const S* from, int64_t from_row, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < columns; d += kCacheLine / int64_t(sizeof(S)))
      prefetch_far(from + r * from_row + d);
}

// Rows that are wanted after the work at hand, asked for while it goes on: a few at a time, for
// more than the processor can have under way would hold that work up.
class Ahead {
 public:
  void clear() { count_ = at_ = row_ = lines_ = 0; }

  // As many of these rows as still fit in a part of the second-level cache.
  template <class S>
  void add(const S* from, int64_t from_row, int64_t rows, int64_t columns) {
    const int64_t size = sizeof(S), bytes = columns * size;
    const int64_t lines = std::max<int64_t>(1, ceil_div(bytes, kCacheLine));
    const int64_t fit = std::min(rows, (kMostLines - lines_) / lines);
    if (fit <= 0 || count_ == kMostParts) return;
    parts_[count_++] = {reinterpret_cast<const char*>(from), from_row * size, bytes, fit};
    lines_ += fit * lines;
  }

  // Cuts what was added into so many shares, at least one.
  void divide(int64_t shares) { share_ = ceil_div(lines_, shares); }

  // Asks for the next share.
  void ask() {
    for (int64_t lines = 0; lines < share_ && at_ < count_;) {
      const Part& part = parts_[at_];
      for (int64_t x = 0; x < part.bytes; x += kCacheLine, ++lines)
        prefetch_far(part.from + row_ * part.row + x);
      if (++row_ == part.rows) row_ = 0, ++at_;
    }
  }

 private:
  static constexpr int kMostParts = 8;
  // Of a second-level cache of 512 KB, as that of AMD's Zen, beside what is being worked on.
  static constexpr int64_t kMostLines = 192 * 1024 / kCacheLine;

  struct Part {
    const char* from;
    int64_t row, bytes, rows;  // row: bytes from one to the next
  };

  Part parts_[kMostParts];
  int count_ = 0, at_ = 0;
  int64_t row_ = 0, lines_ = 0, share_ = 0;
};

}  // namespace pykernels

// Logits lie transposed, [V, rows]: the softmax of a row then goes down a lane, where nothing is
// added across lanes, and W enters every product as it lies in memory.
//
// Where gradients are wanted beside the loss, the logits of a chunk of rows are kept until the
// softmax of these rows is known, and become their own gradients: three products in all. Where the
// softmax is known beforehand, and where no gradient is wanted, they live for one block of words.
#include "linear_cross_entropy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

#include <pybind11/stl.h>

#include "../bind.h"
#include "../core/vec_math.h"

namespace pykernels {
namespace {

// Bytes of a chunk of logits: the more rows, the more rarely W and its gradient come from memory.
constexpr int64_t kLogitBytes = int64_t{24} << 20;

// Bytes of the gradients of a chunk of rows in all threads together, which are summed in the end.
constexpr int64_t kPartBytes = int64_t{32} << 20;

// Rows of a chunk: at least so many, however many words there are, and where nothing is kept at
// most so many, since the logits of a block of words stay in the second-level cache.
constexpr int64_t kFewestRows = 48, kMostRows = 384;

// Words, and numbers of each, of W that a thread keeps in its second-level cache: 400 KB.
constexpr int64_t kWords = 192;
template <class T>
constexpr int64_t kSlice = 2048 / sizeof(T);

// `count` values, or as many more as make rows of that length start in every set of a cache: an odd
// number of lines.
template <class T>
constexpr int64_t odd_lines(int64_t count) {
  constexpr int64_t line = kCacheLine / sizeof(T);
  return (count + line - 1) / line % 2 ? count : count + line;
}

template <class S>
class Pass {
  using T = compute_t<S>;
  static constexpr int64_t kWidth = kPanel<T>;

 public:
  Pass(int threads, const LinearCrossEntropy<S>& p)
      : p_(p), n_(p.sizes), threads_(threads), gradients_(p.dx || p.dweight || p.dbias),
        stored_(gradients_ && !p.known), rows_(choose_rows()), z_row_(odd_lines<T>(rows_)),
        w_row_(odd_lines<T>(round_up(std::min(n_.H, kSlice<T>), kWidth))),
        h_row_(round_up(n_.H, kWidth)), logits_((stored_ ? n_.V : threads * kWords) * z_row_),
        xt_(packed_size<T>(n_.H, rows_)), xs_(p.dweight ? packed_size<T>(rows_, n_.H) : 0),
        slices_(threads * kWords * w_row_), dx_(p.dx ? threads * rows_ * h_row_ : 0),
        parts_(threads * kParts * rows_), best_(p.argmax ? threads * rows_ : 0),
        coefficients_(kCoefficients * rows_) {}

  void run(const Team& team) const {
    for (int64_t r0 = 0; r0 < n_.N; r0 += rows_) {
      const Range rows{r0, std::min(n_.N, r0 + rows_)};
      prepare(team, rows);
      team.wait();
      walk(team, rows);
      if (!p_.known) {
        team.wait();
        finish_softmax(team, rows);
        team.wait();
        if (gradients_)
          for_each_block(team, [&](Range v) { differentiate(team, rows, v, logits(team, v)); });
      }
      team.wait();
      if (p_.dx) add_dx(team, rows);
    }
  }

 private:
  // Of each row, what a thread knows from its words, and what makes gradients of logits.
  enum Part { kTop, kSum, kSmooth, kParts };
  enum Coefficient { kTarget, kShift, kFactor, kHit, kEven, kCoefficients };

  T* part(int rank, Part which) const { return parts_.get() + (rank * kParts + which) * rows_; }
  T* coefficient(Coefficient which) const { return coefficients_.get() + which * rows_; }
  T* logits(const Team& team, Range v) const {
    return logits_.get() + (stored_ ? v.begin : team.rank * kWords) * z_row_;
  }
  T* slice(const Team& team) const { return slices_.get() + team.rank * kWords * w_row_; }

  int64_t choose_rows() const {
    const int64_t fit = kLogitBytes / int64_t(sizeof(T)) / n_.V;
    const int64_t h_row = round_up(n_.H, kWidth);
    int64_t most = stored_ ? std::min(kMostRows, std::max(kFewestRows, fit)) : kMostRows;
    if (p_.dx)  // of which every thread has a part
      most = std::min(most,
                      std::max(kFewestRows, kPartBytes / (threads_ * h_row * int64_t(sizeof(T)))));
    const int64_t chunks = std::max<int64_t>(1, ceil_div(n_.N, most));
    return std::max(kWidth, round_up(ceil_div(n_.N, chunks), kWidth));
  }

  // Runs body(words) over this thread's words, a block at a time.
  template <class Body>
  void for_each_block(const Team& team, const Body& body) const {
    const Range mine = team.share(n_.V, kTileRows);
    for (int64_t v = mine.begin; v < mine.end; v += kWords)
      body(Range{v, std::min(mine.end, v + kWords)});
  }

  bool counts(int64_t i) const { return p_.target[i] != p_.ignore_index; }

  // Packs the rows, and starts their sums.
  void prepare(const Team& team, Range rows) const {
    const S* const x = p_.x + rows.begin * n_.H;
    pack_panels<T>(team, View<S>{x, 1, n_.H}, n_.H, rows.size(), xt_.get());
    if (p_.dweight) pack_panels<T>(team, View<S>{x, n_.H, 1}, rows.size(), n_.H, xs_.get());
    std::fill_n(part(team.rank, kTop), rows_, -kInfinity<T>);
    std::fill_n(part(team.rank, kSum), 2 * rows_, T(0));
    if (p_.argmax) std::fill_n(best_.get() + team.rank * rows_, rows_, int64_t{0});
    const Range mine = team.share(rows_);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      // The rows past the last one: their weights are zero.
      coefficient(kShift)[r] = kInfinity<T>;
      coefficient(kFactor)[r] = coefficient(kHit)[r] = coefficient(kEven)[r] = T(0);
      const int64_t i = rows.begin + r;
      if (p_.known && i < rows.end)
        set_coefficients(r, i, p_.top[i], p_.inverse[i], p_.top[i] - std::log(p_.inverse[i]));
    }
  }

  void walk(const Team& team, Range rows) const {
    for_each_block(team, [&](Range v) {
      T* const z = logits(team, v);
      multiply(team, rows, v, z);
      if (p_.known) return differentiate(team, rows, v, z);
      pick_targets(rows, v, z);
      add_to_softmax(team, rows, v, z);
    });
  }

  // Widens W[words, h] into this thread's slice.
  void copy_slice(const Team& team, Range v, Range h) const {
    T* to = slice(team);
    for (int64_t c = v.begin; c < v.end; ++c, to += w_row_) {
      const S* const from = p_.weight + c * n_.H + h.begin;
      for (int64_t k = 0; k < h.size(); k += lanes<T>)
        store(to + k, load_n(from + k, h.size() - k));
    }
  }

  // z = W x^T + b for a block of words.
  void multiply(const Team& team, Range rows, Range v, T* z) const {
    const Range panels{0, ceil_div(rows.size(), kWidth)};
    const T* const w = slice(team);
    for (int64_t h = 0; h < n_.H; h += kSlice<T>) {
      const int64_t size = std::min(kSlice<T>, n_.H - h);
      copy_slice(team, v, {h, h + size});
      for (int64_t k = 0; k < size; k += kDepth<T>) {
        const int64_t depth = std::min(kDepth<T>, size - k);
        for_each_tile_column(
            {0, v.size()}, panels,
            [&](int64_t row, int64_t tiles, int64_t height, int64_t panel, int64_t wide) {
              multiply_tile(height, wide, depth, w + row * w_row_ + k, w_row_, 1,
                            xt_.get() + panel * n_.H * kWidth + (h + k) * kWidth, n_.H * kWidth,
                            kWidth, h + k > 0, z + row * z_row_ + panel * kWidth, z_row_, tiles,
                            height * w_row_);
            });
      }
    }
    if (!p_.bias) return;
    for (int64_t c = v.begin; c < v.end; ++c, z += z_row_) {
      const vec<T> b = broadcast(T(widen(p_.bias[c])));
      for (int64_t r = 0; r < rows.size(); r += lanes<T>) store(z + r, load(z + r) + b);
    }
  }

  void pick_targets(Range rows, Range v, const T* z) const {
    for (int64_t r = 0; r < rows.size(); ++r) {
      const int64_t c = p_.target[rows.begin + r] - v.begin;
      if (counts(rows.begin + r) && c >= 0 && c < v.size())
        coefficient(kTarget)[r] = z[c * z_row_ + r];
    }
  }

  // Adds a block of words to this thread's part of the softmax: M. Milakov and N. Gimelshein,
  // "Online normalizer calculation for softmax" (2018).
  void add_to_softmax(const Team& team, Range rows, Range v, const T* z) const {
    T* const top = part(team.rank, kTop);
    T* const sum = part(team.rank, kSum);
    T* const smooth = part(team.rank, kSmooth);
    for (int64_t r = 0; r < rows.size(); r += lanes<T>) {
      const T* const column = z + r;
      const vec<T> before = load(top + r);
      vec<T> now = before;
      for (int64_t c = 0; c < v.size(); ++c) now = max(now, load(column + c * z_row_));
      // -inf less -inf is NaN, where all words so far have no chance: then nothing is shifted.
      const vec<T> shift = select(now == -kInfinity<T>, vec<T>{}, now);
      vec<T> total{};
      for (int64_t c = 0; c < v.size(); ++c)
        total += exp2_softmax<T>((load(column + c * z_row_) - shift) * T(kLog2E));
      store(top + r, now);
      store(sum + r, load(sum + r) * exp2_softmax<T>((before - shift) * T(kLog2E)) + total);
      if (p_.smoothing > 0 && p_.loss) {
        total = vec<T>{};
        for (int64_t c = 0; c < v.size(); ++c)
          total += load(column + c * z_row_) * class_weight(v.begin + c);
        store(smooth + r, load(smooth + r) + total);
      }
      if (p_.argmax)
        for (int64_t i = r; i < std::min(rows.size(), r + lanes<T>); ++i)
          if (now[i - r] > before[i - r]) {
            int64_t c = 0;
            while (z[c * z_row_ + i] != now[i - r]) ++c;
            best_.get()[team.rank * rows_ + i] = v.begin + c;
          }
    }
  }

  // Puts the parts of all threads together, in their order.
  void finish_softmax(const Team& team, Range rows) const {
    const Range mine = team.share(rows.size());
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t i = rows.begin + r;
      T top = -kInfinity<T>, sum = 0, smooth = 0;
      int64_t best = 0;
      for (int k = 0; k < team.size; ++k) {
        if (p_.argmax && part(k, kTop)[r] > top) best = best_.get()[k * rows_ + r];
        top = std::max(top, part(k, kTop)[r]);
      }
      for (int k = 0; k < team.size; ++k) {
        const T rest = part(k, kTop)[r] - top;
        // A part without words, or without any that has a chance, is 0, and NaN stays NaN.
        sum += part(k, kSum)[r] * (rest > -kInfinity<T> ? std::exp(rest) : T(1));
        smooth += part(k, kSmooth)[r];
      }
      const T lse = top + std::log(sum);
      p_.top[i] = top;
      p_.inverse[i] = 1 / sum;
      if (p_.lse) p_.lse[i] = lse;
      if (p_.argmax) p_.argmax[i] = best;
      if (p_.loss)
        p_.loss[i] = counts(i) ? loss(i, std::log(sum) + (top - coefficient(kTarget)[r]),
                                      T(p_.class_weight_sum) * lse - smooth)
                               : T(0);
      if (gradients_) set_coefficients(r, i, top, 1 / sum, lse);
    }
  }

  T class_weight(int64_t c) const { return p_.class_weight ? p_.class_weight[c] : T(1); }
  T hit(int64_t i) const { return T(1 - p_.smoothing) * class_weight(p_.target[i]); }
  T even() const { return T(p_.smoothing / double(n_.V)); }

  T loss(int64_t i, T of_target, T of_all) const {
    return p_.smoothing > 0 ? hit(i) * of_target + even() * of_all : hit(i) * of_target;
  }

  // d z_c = factor exp(z_c - shift) - even w_c, and less hit at the target.
  void set_coefficients(int64_t r, int64_t i, T top, T inverse, T lse) const {
    T factor = p_.dlse ? p_.dlse[i] : T(0);
    T at_target = 0, at_all = 0;
    if (counts(i)) {
      at_target = p_.loss_rate[i] * hit(i);
      at_all = p_.loss_rate[i] * even();
      factor += at_target + at_all * T(p_.class_weight_sum) + T(p_.lse_rate) * lse;
    }
    coefficient(kShift)[r] = top;
    coefficient(kFactor)[r] = factor * inverse;
    coefficient(kHit)[r] = at_target;
    coefficient(kEven)[r] = at_all;
  }

  // The logits of a block of words become their gradients, and these go into all three sums.
  void differentiate(const Team& team, Range rows, Range v, T* z) const {
    const T *const shift = coefficient(kShift), *const factor = coefficient(kFactor);
    const T* const even = coefficient(kEven);
    for (int64_t c = 0; c < v.size(); ++c) {
      T* const row = z + c * z_row_;
      const T w = class_weight(v.begin + c);
      for (int64_t r = 0; r < rows.size(); r += lanes<T>)
        store(row + r,
              exp2_softmax<T>((load(row + r) - load(shift + r)) * T(kLog2E)) * load(factor + r) -
                  load(even + r) * w);
    }
    for (int64_t r = 0; r < rows.size(); ++r) {
      const int64_t c = p_.target[rows.begin + r] - v.begin;
      if (counts(rows.begin + r) && c >= 0 && c < v.size())
        z[c * z_row_ + r] -= coefficient(kHit)[r];
    }
    if (p_.dbias) add_dbias(rows, v, z);
    if (p_.dx) add_to_dx(team, rows, v, z);
    if (p_.dweight) add_dweight(rows, v, z);
  }

  void add_dbias(Range rows, Range v, const T* z) const {
    for (int64_t c = v.begin; c < v.end; ++c, z += z_row_) {
      vec<T> sum{};
      int64_t r = 0;
      for (; r + lanes<T> <= rows.size(); r += lanes<T>) sum += load(z + r);
      if (r < rows.size())
        sum += load_n(z + r, rows.size() - r);  // NaN past it, where W is infinite
      p_.dbias[c] = reduce_add(sum) + (rows.begin > 0 ? p_.dbias[c] : T(0));
    }
  }

  // This thread's part of dx += dz^T W.
  void add_to_dx(const Team& team, Range rows, Range v, const T* z) const {
    T* const dx = dx_.get() + team.rank * rows_ * h_row_;
    const T* const w = slice(team);
    const bool first = v.begin == team.share(n_.V, kTileRows).begin;
    for (int64_t h = 0; h < n_.H; h += kSlice<T>) {
      const int64_t size = std::min(kSlice<T>, n_.H - h);
      // A single slice is still there from the product that made these logits.
      if (stored_ || size < n_.H) copy_slice(team, v, {h, h + size});
      for_each_tile_column(
          {0, rows.size()}, {0, ceil_div(size, kWidth)},
          [&](int64_t row, int64_t tiles, int64_t height, int64_t panel, int64_t wide) {
            multiply_tile(height, wide, v.size(), z + row, 1, z_row_, w + panel * kWidth, kWidth,
                          w_row_, !first, dx + row * h_row_ + h + panel * kWidth, h_row_, tiles,
                          height);
          });
    }
  }

  // dx of the rows, from the parts of all threads in their order.
  void add_dx(const Team& team, Range rows) const {
    const Range mine = team.share(rows.size());
    for (int64_t r = mine.begin; r < mine.end; ++r)
      for (int64_t h = 0; h < n_.H; h += lanes<T>) {
        vec<T> sum{};
        for (int k = 0; k < team.size; ++k)  // a thread that has no words has no part
          if (split(n_.V, kTileRows, team.size, k).size() > 0)
            sum += load(dx_.get() + (k * rows_ + r) * h_row_ + h);
        store_n(p_.dx + (rows.begin + r) * n_.H + h, sum, n_.H - h);
      }
  }

  // dW += dz x. The rows of dW come from memory: they are asked for a tile ahead.
  void add_dweight(Range rows, Range v, const T* z) const {
    alignas(kCacheLine) T edge[kTileSize<T>];
    const bool accumulate = rows.begin > 0;
    const int64_t panels = ceil_div(n_.H, kWidth), depth = rows.size();
    for_each_tile_row(v.size(), [&](int64_t row, int64_t count) {
      T* const to = p_.dweight + (v.begin + row) * n_.H;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t h = panel * kWidth, valid = std::min(kWidth, n_.H - h);
        for (int64_t i = 0; accumulate && i < count; ++i) prefetch(to + i * n_.H + h + 2 * kWidth);
        const bool whole = valid == kWidth;
        multiply_tile(count, 1, depth, z + row * z_row_, z_row_, 1, xs_.get() + h * depth, 0,
                      kWidth, whole && accumulate, whole ? to + h : edge, whole ? n_.H : kWidth);
        for (int64_t i = 0; !whole && i < count; ++i)
          for (int64_t k = 0; k < valid; ++k) {
            T* const one = to + i * n_.H + h + k;
            *one = edge[i * kWidth + k] + (accumulate ? *one : T(0));
          }
      }
    });
  }

  const LinearCrossEntropy<S>& p_;
  const LinearCrossEntropySizes& n_;
  const int threads_;
  const bool gradients_, stored_;
  const int64_t rows_, z_row_, w_row_, h_row_;
  const Scratch<T> logits_;  // [V or a block a thread, z_row]
  const Scratch<T> xt_;      // the rows as columns of panels, [rows / kWidth][H, kWidth]
  const Scratch<T> xs_;      // and as they are, [H / kWidth][rows, kWidth]
  const Scratch<T> slices_;  // [threads, kWords, w_row]
  const Scratch<T> dx_;      // [threads, rows, h_row]
  const Scratch<T> parts_;   // [threads, kParts, rows]
  const Scratch<int64_t> best_;
  const Scratch<T> coefficients_;  // [kCoefficients, rows]
};

}  // namespace

template <class S>
void linear_cross_entropy(int threads, const LinearCrossEntropy<S>& p) {
  const Pass<S> pass(threads, p);
  parallel(threads, [&](const Team& team) { pass.run(team); });
}

namespace {

using Sizes = std::array<int64_t, 3>;   // N, H, V
using Inputs = std::array<Address, 5>;  // x, weight, target, bias, class_weight

template <class S>
LinearCrossEntropy<S> arguments(const Sizes& n, double smoothing, int64_t ignore_index,
                                const Inputs& in) {
  LinearCrossEntropy<S> p{};
  p.sizes = {n[0], n[1], n[2]};
  p.x = pointer<const S>(in[0]);
  p.weight = pointer<const S>(in[1]);
  p.target = pointer<const int64_t>(in[2]);
  p.bias = pointer<const S>(in[3]);
  p.class_weight = pointer<const compute_t<S>>(in[4]);
  p.class_weight_sum = n[2];
  if (p.class_weight)
    p.class_weight_sum = std::accumulate(p.class_weight, p.class_weight + n[2], 0.0);
  p.smoothing = smoothing;
  p.ignore_index = ignore_index;
  return p;
}

// The order is that of _REDUCTIONS in pykernels/cpp/linear_cross_entropy.py.
enum Reduction : int { kMean, kSum, kNone };

// The loss of all rows: [N] if they are not reduced, or a number. Where there is room for gradients
// they are those of that number.
template <class S>
void reduce(int threads, LinearCrossEntropy<S> p, double z_loss, Reduction reduction,
            compute_t<S>* loss) {
  using T = compute_t<S>;
  const int64_t N = p.sizes.N, H = p.sizes.H, V = p.sizes.V;
  const auto counts = [&](int64_t i) { return p.target[i] != p.ignore_index; };
  int64_t count = 0;
  double divisor = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (!counts(i)) continue;
    const int64_t t = p.target[i];
    if (t < 0 || t >= V) throw std::out_of_range("linear_cross_entropy: a target is out of range");
    ++count;
    divisor += p.class_weight ? p.class_weight[t] : 1;
  }
  const bool mean = reduction == kMean;
  std::vector<T> losses(reduction == kNone ? 0 : N), lses(z_loss && !p.lse ? N : 0), rates;
  p.loss = reduction == kNone ? loss : losses.data();
  if (z_loss && !p.lse) p.lse = lses.data();
  if (p.dx || p.dweight || p.dbias) {
    rates.reserve(N);
    for (int64_t i = 0; i < N; ++i) rates.push_back(!counts(i) ? 0 : mean ? 1 / divisor : 1);
    p.loss_rate = rates.data();
    p.lse_rate = 2 * z_loss / (mean ? std::max<int64_t>(count, 1) : 1);
    if (N == 0 && p.dweight) std::fill_n(p.dweight, V * H, T(0));
    if (N == 0 && p.dbias) std::fill_n(p.dbias, V, T(0));
  }
  linear_cross_entropy<S>(threads, p);

  const auto square = [&](int64_t i) {
    return z_loss && counts(i) ? z_loss * p.lse[i] * double(p.lse[i]) : 0;
  };
  if (reduction == kNone) {
    for (int64_t i = 0; z_loss && i < N; ++i) loss[i] += T(square(i));
    return;
  }
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < N; ++i) {
    sum += p.loss[i];
    squares += square(i);
  }
  *loss = T(mean ? sum / divisor + (z_loss ? squares / count : 0) : sum + squares);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_forward",
        [](int dtype, int threads, const Sizes& n, double smoothing, double z_loss,
           int64_t ignore_index, int reduction, const Inputs& in,
           const std::array<Address, 7>& out) {  // loss, lse, argmax, softmax, dx, dweight, dbias
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            auto p = arguments<S>(n, smoothing, ignore_index, in);
            p.lse = pointer<T>(out[1]);
            p.argmax = pointer<int64_t>(out[2]);
            p.top = pointer<T>(out[3]);
            p.inverse = p.top + n[0];
            p.dx = pointer<T>(out[4]);
            p.dweight = pointer<T>(out[5]);
            p.dbias = pointer<T>(out[6]);
            reduce<S>(threads, p, z_loss, static_cast<Reduction>(reduction), pointer<T>(out[0]));
          });
        });
  m.def("linear_cross_entropy_backward",
        [](int dtype, int threads, const Sizes& n, double smoothing, int64_t ignore_index,
           const Inputs& in, Address softmax, const std::array<Address, 2>& rates,  // of loss, lse
           const std::array<Address, 3>& out) {  // dx, dweight, dbias
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            auto p = arguments<S>(n, smoothing, ignore_index, in);
            p.top = pointer<T>(softmax);
            p.inverse = p.top + n[0];
            p.known = true;
            p.loss_rate = pointer<const T>(rates[0]);
            p.dlse = pointer<const T>(rates[1]);
            p.dx = pointer<T>(out[0]);
            p.dweight = pointer<T>(out[1]);
            p.dbias = pointer<T>(out[2]);
            linear_cross_entropy<S>(threads, p);
          });
        });
}

}  // namespace pykernels

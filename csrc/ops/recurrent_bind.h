// How Python's arguments become the parameters of a recurrent pass.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "../bind.h"
#include "recurrent.h"

namespace pykernels {

using RecurrentShape = std::array<int64_t, 5>;  // T, B, I, H, R

// The rows of a batch. `batch_sizes` [T] says how many sequences reach each step; it may be empty
// in a dense batch.
class Batch {
 public:
  Batch(const RecurrentShape& n, const std::vector<int64_t>& batch_sizes, bool reverse)
      : T_(n[0]), B_(n[1]), reverse_(reverse) {
    if (batch_sizes.empty() || batch_sizes.back() == B_) return;  // dense: they never grow
    offsets_.push_back(0);
    for (const int64_t rows : batch_sizes) offsets_.push_back(offsets_.back() + rows);
  }
  Walk walk() const { return {T_, B_, offsets_.empty() ? nullptr : offsets_.data(), reverse_}; }

 private:
  const int64_t T_, B_;
  const bool reverse_;
  std::vector<int64_t> offsets_;
};

inline RecurrentSizes recurrent_sizes(const RecurrentShape& n) {
  return {n[0], n[1], n[2], n[3], n[4]};
}

// x, w_ih, w_hh, b_ih, b_hh, h0, w_hr, packed and y, h_n
template <class S>
RecurrentForward<S> recurrent_forward(const RecurrentShape& n, const Batch& batch, const Link& link,
                                      const std::array<Address, 8>& in,
                                      const std::array<Address, 2>& out) {
  return {recurrent_sizes(n),
          batch.walk(),
          link,
          pointer<const S>(in[0]),
          pointer<const S>(in[1]),
          pointer<const S>(in[2]),
          pointer<const S>(in[3]),
          pointer<const S>(in[4]),
          pointer<const S>(in[5]),
          pointer<const S>(in[6]),
          pointer<const compute_t<S>>(in[7]),
          pointer<S>(out[0]),
          pointer<S>(out[1])};
}

// Runs the passes that make(tag, call, batch, threads, link) returns, one for each of `calls`: a
// single one on all threads, several side by side on one thread each. If `chained`, what the walk
// of one makes step by step is read by the next.
//
// A call is a tuple that begins with the shape, the batch sizes and whether time runs backwards.
template <class Call, class Make>
void run_passes(int dtype, int threads, bool chained, const std::vector<Call>& calls,
                const Make& make) {
  dispatch(dtype, [&](auto tag) {
    std::vector<Batch> batches;
    for (const Call& call : calls)
      batches.emplace_back(std::get<0>(call), std::get<1>(call), std::get<2>(call));
    const size_t count = calls.size();
    if (count == 1) return run_alone(*make(tag, calls[0], batches[0], threads, Link{}));
    std::vector<Progress> progress(count);
    std::vector<std::unique_ptr<Pass>> passes;
    for (size_t i = 0; i < count; ++i) {
      Link link;
      if (chained && i > 0) link.source = &progress[i - 1];
      if (chained && i + 1 < count) link.done = &progress[i];
      passes.push_back(make(tag, calls[i], batches[i], 1, link));
    }
    run_side_by_side(threads, passes);
  });
}

// <op>_packed_size and <op>_pack: the values in packed weights, and the packing of w_ih, w_hh,
// b_ih, b_hh, w_hr for forward passes to come.
template <template <class> class Cell>
void bind_pack(py::module_& m, const std::string& op) {
  m.def((op + "_packed_size").c_str(), [](int dtype, const RecurrentShape& n, bool projection) {
    const RecurrentSizes sizes = recurrent_sizes(n);
    return dtype == kFloat64 ? PackedLayout<double, Cell<double>>(sizes, projection).size
                             : PackedLayout<float, Cell<float>>(sizes, projection).size;
  });
  m.def((op + "_pack").c_str(), [](int dtype, int threads, const RecurrentShape& n,
                                   const std::array<Address, 5>& in, Address to) {
    dispatch(dtype, [&](auto tag) {
      using S = typename decltype(tag)::type;
      using T = compute_t<S>;
      RecurrentForward<S> p{};
      p.sizes = recurrent_sizes(n);
      p.w_ih = pointer<const S>(in[0]);
      p.w_hh = pointer<const S>(in[1]);
      p.b_ih = pointer<const S>(in[2]);
      p.b_hh = pointer<const S>(in[3]);
      p.w_hr = pointer<const S>(in[4]);
      parallel(threads, [&](const Team& team) { pack_forward<Cell<T>>(team, p, pointer<T>(to)); });
    });
  });
}

// x, w_ih, w_hh, h0, w_hr, y, dy, dh_n and dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dw_hr
template <class S>
RecurrentBackward<S> recurrent_backward(const RecurrentShape& n, const Batch& batch,
                                        const Link& link, const std::array<Address, 8>& in,
                                        const std::array<Address, 7>& out) {
  return {recurrent_sizes(n),
          batch.walk(),
          link,
          pointer<const S>(in[0]),
          pointer<const S>(in[1]),
          pointer<const S>(in[2]),
          pointer<const S>(in[3]),
          pointer<const S>(in[4]),
          pointer<const S>(in[5]),
          pointer<const S>(in[6]),
          pointer<const S>(in[7]),
          pointer<S>(out[0]),
          pointer<S>(out[1]),
          pointer<S>(out[2]),
          pointer<S>(out[3]),
          pointer<S>(out[4]),
          pointer<S>(out[5]),
          pointer<S>(out[6])};
}

}  // namespace pykernels

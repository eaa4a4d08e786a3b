// What Python calls for packed sequences: attention_forward.cpp and attention_backward.cpp, by the
// dtype, on places that are checked.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "attention_bind.h"

namespace pykernels {
namespace {

// Where there are integers, and whether of int32; else of int64. 0 for none.
using Integers = std::pair<Address, bool>;
// cu_seqlens_q, cu_seqlens_k, seqused_k, block_table; whether ends meet.
using PlacesGiven = std::pair<std::array<Integers, 4>, bool>;
// Pages there are, rows of each, and pages that a row of the table names; zeros without one.
using Paging = std::array<int64_t, 3>;

constexpr const char* kNoPlaces =
    "attention_varlen: cu_seqlens, seqused_k or block_table point outside";

std::vector<int64_t> integers(const Integers& from, int64_t count) {
  const auto& [address, is_int32] = from;
  if (!address) return {};
  if (count < 0) throw std::out_of_range(kNoPlaces);  // an empty cu_seqlens
  if (is_int32) return {pointer<int32_t>(address), pointer<int32_t>(address) + count};
  return {pointer<int64_t>(address), pointer<int64_t>(address) + count};
}

const int64_t* data_or_none(const std::vector<int64_t>& v) {
  return v.empty() ? nullptr : v.data();
}

// Where the sequences lie. Throws an std::out_of_range where they overrun the rows, decrease, use
// more keys than there are, or name a page that is not there.
class Places {
 public:
  Places(const PlacesGiven& given, const AttentionNumbers& n, const Paging& paging)
      : B_(n[0]), queries_(integers(given.first[0], B_ + 1)),
        keys_(integers(given.first[1], B_ + 1)), used_(integers(given.first[2], B_)),
        table_(integers(given.first[3], B_ * paging[2])), paging_(paging),
        ends_meet_(given.second) {
    longest_q_ = longest(queries_, n[3]);
    if (!keys_.empty()) longest_k_ = longest(keys_, n[4]);
    if (used_.empty()) return;
    longest_k_ = *std::max_element(used_.begin(), used_.end());
    const int64_t pages = paging[0], size = paging[1], per_sequence = paging[2];
    for (int64_t b = 0; b < B_; ++b) {
      const int64_t room = keys_.empty() ? per_sequence * size : keys_[b + 1] - keys_[b];
      require(0 <= used_[b] && used_[b] <= room);
      for (int64_t i = 0; i * size < used_[b] && !table_.empty(); ++i) {
        const int64_t page = table_[b * per_sequence + i];
        require(0 <= page && page < pages);
      }
    }
  }

  AttentionPacking packing() const {
    return {queries_.data(), data_or_none(keys_), data_or_none(used_),
            longest_q_,      longest_k_,          ends_meet_};
  }
  AttentionPages pages() const { return {data_or_none(table_), paging_[2], paging_[1]}; }
  int64_t end_of_queries() const { return queries_.back(); }
  // Whether some sequence has each of the rows of k.
  bool all_keys(int64_t rows) const { return used_.empty() && keys_.back() == rows; }

 private:
  static void require(bool right) {
    if (!right) throw std::out_of_range(kNoPlaces);
  }

  static int64_t longest(const std::vector<int64_t>& starts, int64_t rows) {
    require(!starts.empty() && starts[0] == 0 && starts.back() <= rows);
    int64_t found = 0;
    for (size_t b = 1; b < starts.size(); ++b) {
      require(starts[b] >= starts[b - 1]);
      found = std::max(found, starts[b] - starts[b - 1]);
    }
    return found;
  }

  const int64_t B_;
  const std::vector<int64_t> queries_, keys_, used_, table_;
  const Paging paging_;
  const bool ends_meet_;
  int64_t longest_q_ = 0, longest_k_ = 0;
};

// Zeros in rows of each head of a packed tensor.
template <class S>
void fill_rows(const Heads<S>& to, int64_t heads, Range rows, int64_t columns) {
  for (int64_t h = 0; to.data && h < heads; ++h)
    for (int64_t i = rows.begin; i < rows.end; ++i)
      std::fill_n(to.data + h * to.head + i * to.row, columns, S{});
}

}  // namespace

void bind_attention_varlen(py::module_& m) {
  m.def("attention_varlen_forward",
        [](int dtype, int threads, const AttentionNumbers& n, const AttentionReals& reals,
           const PlacesGiven& where, const Paging& paging, const AttentionRuleGiven& given,
           const std::array<StridedHeads, 3>& in, const StridedHeads& out, Address lse,
           Address rows) {
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            const Places places(where, n, paging);
            AttentionForward<S> p{};
            p.packing = places.packing();
            p.pages = places.pages();
            take_inputs<S>(n, reals, given, in.data(), &p);
            p.out = strided_heads<S>(out, p.packing.queries);
            p.lse = pointer<T>(lse);
            p.rows = attention_rows(pointer<T>(rows), n[1] * n[3]);
            const Range behind{places.end_of_queries(), n[3]};
            fill_rows(p.out, n[1], behind, n[6]);
            for (int64_t h = 0; p.lse && h < n[1]; ++h)
              std::fill(p.lse + h * n[3] + behind.begin, p.lse + (h + 1) * n[3], -kInfinity<T>);
            attention_forward<S>(threads, p);
          });
        });
  m.def("attention_varlen_backward",
        [](int dtype, int threads, const AttentionNumbers& n, const AttentionReals& reals,
           const PlacesGiven& where, const AttentionRuleGiven& given,
           const std::array<StridedHeads, 5>& in, Address rows, Address dlse,
           const std::array<StridedHeads, 3>& grads, Address dsinks) {
          dispatch(dtype, [&](auto tag) {
            using S = typename decltype(tag)::type;
            using T = compute_t<S>;
            const Places places(where, n, {});
            AttentionBackward<S> p{};
            p.packing = places.packing();
            take_inputs<S>(n, reals, given, in.data(), &p);
            take_gradients<S>(in.data(), dlse, grads, dsinks, &p);
            p.rows = attention_rows(pointer<const T>(rows), n[1] * n[3]);
            p.whole = true;
            fill_rows(p.dq, n[1], {places.end_of_queries(), n[3]}, n[5]);
            if (!places.all_keys(n[4])) {
              fill_rows(p.dk, n[2], {0, n[4]}, n[5]);
              fill_rows(p.dv, n[2], {0, n[4]}, n[6]);
            }
            attention_backward<S>(threads, p);
          });
        });
}

}  // namespace pykernels

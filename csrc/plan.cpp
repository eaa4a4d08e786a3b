// A pass of an op on tensors of known shapes: all but memory is planned once.
//
// Python takes longer than a small kernel to ask tensors where they are, to make those for the
// results and to put the arguments together; here that takes a fraction.
#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <pybind11/stl.h>

#include "exchange.h"

namespace pykernels {
namespace {

bool row_major(const dlpack::Tensor& t) {
  int64_t next = 1;
  for (int32_t axis = t.ndim - 1; axis >= 0; --axis) {
    if (t.shape[axis] != 1 && t.strides[axis] != next) return false;
    next *= t.shape[axis];
  }
  return true;
}

bool rows_dense(const dlpack::Tensor& t) {
  return t.ndim >= 3 && (t.strides[t.ndim - 1] == 1 || t.shape[t.ndim - 1] == 1);
}

// The first strides; of a tensor that broadcasts, 0 along an axis of size one.
py::tuple strides(const dlpack::Tensor& t, int32_t count, bool broadcast) {
  py::tuple found(count);
  for (int32_t axis = 0; axis < count; ++axis) {
    const bool none = !t.strides || (broadcast && t.shape[axis] == 1);
    found[axis] = py::int_(none ? 0 : t.strides[axis]);
  }
  return found;
}

// What a hole is filled with: What of pykernels/cpp/__init__.py.
enum What : int { kAddress, kStart, kStrides, kRows, kPacked, kItself };

// A part of the arguments, or of what a pass returns.
struct Part {
  bool is_hole = false;
  What what = kAddress;
  size_t index = 0;
  py::object constant;      // if it holds no hole
  std::vector<Part> items;  // else, of a list or a tuple
  bool is_list = false;
};

// Strides of batch or page, head and row of a tensor [.., rows, heads, D].
py::tuple packed_strides(const dlpack::Tensor& t) {
  if (!t.strides) return py::make_tuple(0, 0, 0);
  const int64_t* const rows = t.strides + t.ndim - 3;
  return py::make_tuple(t.ndim > 3 ? t.strides[0] : 0, rows[1], rows[0]);
}

// A tensor that the kernel fills: sizes, strides, dtype, and the number of the tensor, if any, that
// it lies like.
using Result = std::tuple<py::tuple, py::tuple, py::object, std::optional<size_t>>;

// The strides of a dense tensor of such sizes whose last axis is the innermost, and the others in
// the order that they have in `like`; `row_major` where that is theirs.
py::tuple strides_like(const dlpack::Tensor& like, const py::tuple& sizes,
                       const py::tuple& row_major) {
  const int32_t last = like.ndim - 1;
  if (last < 1 || std::is_sorted(like.strides, like.strides + last, std::greater<>()))
    return row_major;
  std::vector<int32_t> order(like.ndim);  // outermost first
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end() - 1,
                   [&](int32_t a, int32_t b) { return like.strides[a] > like.strides[b]; });
  py::tuple found(like.ndim);
  int64_t next = 1;
  for (int32_t i = last; i >= 0; --i) {
    found[order[i]] = py::int_(next);
    next *= std::max<int64_t>(1, py::cast<int64_t>(sizes[order[i]]));
  }
  return found;
}

struct Call {
  py::tuple tensors, results;
  py::tuple laid;                      // the tensors as the kernel wants them
  std::vector<dlpack::Tensor> places;  // of these, then of the results
  py::tuple arguments;                 // of the kernel
};

class Plan {
 public:
  // Args:
  //   exchange: of torch.Tensor
  //   extension: the module of the kernel
  //   plan: Plan of pykernels/cpp/__init__.py
  //   hole: the type of holes
  //   threads: a function that says how many there are
  //   allocator: of the results
  Plan(const Exchange& exchange, const py::module_& extension, const py::object& plan,
       const py::type& hole, const py::object& threads, const Allocator& allocator)
      : exchange_(exchange), extension_(extension), plan_(plan), threads_(threads),
        allocator_(allocator), kernel_(plan.attr("kernel")), code_(plan.attr("code")),
        count_(py::cast<size_t>(plan.attr("count"))) {
    for (const py::handle result : plan.attr("results")) {
      results_.emplace_back();
      if (!result.is_none()) results_.back() = py::cast<Result>(result);
    }
    needs_.resize(count_ + results_.size());
    arguments_ = parse(plan.attr("arguments"), hole);
    returns_ = parse(plan.attr("returns"), hole);
  }

  // (arguments of the kernel, what the pass returns, what must outlive the call of the kernel)
  py::tuple lay_out(const py::tuple& tensors) const {
    const Call call = look_at(tensors);
    return py::make_tuple(call.arguments, fill(returns_, call), call.laid);
  }

  // What the pass returns.
  py::object run(const py::tuple& tensors) const {
    const Call call = look_at(tensors);
    const py::object kernel = extension_.attr(kernel_), threads = threads_();
    std::vector<PyObject*> arguments = {code_.ptr(), threads.ptr()};
    for (const py::handle argument : call.arguments) arguments.push_back(argument.ptr());
    const auto done = py::reinterpret_steal<py::object>(
        PyObject_Vectorcall(kernel.ptr(), arguments.data(), arguments.size(), nullptr));
    if (!done) throw py::error_already_set();
    return fill(returns_, call);
  }

 private:
  struct Needs {
    bool row_major = false, rows_dense = false;
  };

  Part parse(py::handle from, const py::type& hole) {
    Part part;
    if (py::isinstance(from, hole)) {
      const auto [index, what] =
          py::cast<std::pair<size_t, int>>(py::tuple(py::reinterpret_borrow<py::object>(from)));
      part.is_hole = true;
      part.index = index;
      part.what = static_cast<What>(what);
      needs_.at(index).row_major |= part.what == kAddress;
      needs_.at(index).rows_dense |= part.what == kRows || part.what == kPacked;
      return part;
    }
    part.is_list = py::isinstance<py::list>(from);
    if (part.is_list || py::isinstance<py::tuple>(from)) {
      bool constant = true;
      for (const py::handle item : from) {
        part.items.push_back(parse(item, hole));
        constant &= bool(part.items.back().constant);
      }
      if (!constant) return part;
      part.items.clear();
    }
    part.constant = py::reinterpret_borrow<py::object>(from);
    return part;
  }

  Call look_at(const py::tuple& tensors) const {
    if (tensors.size() > count_) throw std::invalid_argument("more tensors than planned");
    Call call{tensors, py::tuple(results_.size()), tensors, {}, py::tuple()};
    bool seen = read(tensors, &call.places);
    if (!seen) {
      call.laid = plan_.attr("lay")(tensors);
      seen = read(call.laid, &call.places);
    }
    const bool quick = allocator_.quick();
    for (size_t i = 0; i < results_.size(); ++i) {
      call.results[i] = py::none();
      if (!results_[i]) continue;
      const auto& [sizes, row_major, dtype, like] = *results_[i];
      const py::tuple strides =
          seen && like ? strides_like(call.places[*like], sizes, row_major) : row_major;
      py::object made = allocator_.make(sizes, strides, dtype, tensors[0], quick);
      if (seen) seen = exchange_.read(made, &call.places[count_ + i]);
      call.results[i] = std::move(made);
    }
    call.arguments = seen ? fill(arguments_, call) : plan_.attr("fill")(call.laid, call.results);
    return call;
  }

  // Whether all tensors lie as the kernel wants them, and where.
  bool read(const py::tuple& tensors, std::vector<dlpack::Tensor>* places) const {
    places->assign(needs_.size(), {});
    if (!exchange_.usable()) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const py::handle tensor = tensors[i];
      if (tensor.is_none()) continue;
      dlpack::Tensor& place = (*places)[i];
      if (!exchange_.read(tensor, &place) || (needs_[i].row_major && !row_major(place)) ||
          (needs_[i].rows_dense && !rows_dense(place)) || !exchange_.signed_as_stored(tensor))
        return false;
    }
    return true;
  }

  py::object itself(size_t index, const Call& call) const {
    if (index >= count_) return call.results[index - count_];
    return index < call.tensors.size() ? py::object(call.tensors[index]) : py::none();
  }

  py::object fill(const Part& part, const Call& call) const {
    if (part.constant) return part.constant;
    if (part.is_hole) {
      const dlpack::Tensor& t = call.places[part.index];
      switch (part.what) {
        case kAddress:
        case kStart: return py::int_(address_of(t));
        case kStrides: return strides(t, t.ndim, true);
        case kRows: return py::make_tuple(address_of(t), strides(t, 3, false));
        case kPacked: return py::make_tuple(address_of(t), packed_strides(t));
        case kItself: return itself(part.index, call);
      }
    }
    if (part.is_list) {
      py::list found(part.items.size());
      for (size_t i = 0; i < part.items.size(); ++i) found[i] = fill(part.items[i], call);
      return std::move(found);
    }
    py::tuple found(part.items.size());
    for (size_t i = 0; i < part.items.size(); ++i) found[i] = fill(part.items[i], call);
    return std::move(found);
  }

  const Exchange exchange_;
  const py::module_ extension_;
  const py::object plan_, threads_;
  const Allocator allocator_;
  const py::object kernel_, code_;
  const size_t count_;
  std::vector<Needs> needs_;  // of tensors, then results
  std::vector<std::optional<Result>> results_;
  Part arguments_, returns_;
};

}  // namespace

// plan: of what Plan takes but the module, the functions lay_out and run of such a plan.
void bind_plan(py::module_& m) {
  m.def("plan", [m](const py::type& tensor_type, const py::object& plan, const py::type& hole,
                    const py::object& threads, const py::tuple& allocator) {
    const auto made =
        std::make_shared<Plan>(Exchange(tensor_type), m, plan, hole, threads, Allocator(allocator));
    return py::make_tuple(
        py::cpp_function([made](const py::tuple& tensors) { return made->lay_out(tensors); }),
        py::cpp_function([made](const py::tuple& tensors) { return made->run(tensors); }));
  });
}

}  // namespace pykernels

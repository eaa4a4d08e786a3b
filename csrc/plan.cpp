// The arguments of a kernel for tensors of known shapes: all but memory is planned once.
#include <memory>
#include <vector>

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
  return t.ndim == 4 && (t.strides[3] == 1 || t.shape[3] == 1);
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

// A tensor that the kernel fills, or none where there is no dtype.
struct Result {
  static constexpr size_t kMostAxes = 5;
  std::vector<py::object> sizes;
  py::object dtype;  // Python's None for that of the first tensor

  // like.new_empty(*sizes, dtype=dtype), or None
  py::object empty(py::handle like) const {
    if (!dtype) return py::none();
    static PyObject* const new_empty = PyUnicode_InternFromString("new_empty");
    static PyObject* const names = py::make_tuple("dtype").release().ptr();
    PyObject* arguments[kMostAxes + 2] = {like.ptr()};
    size_t count = 1;
    for (const py::object& size : sizes) arguments[count++] = size.ptr();
    arguments[count] = dtype.ptr();
    PyObject* const made =
        PyObject_VectorcallMethod(new_empty, arguments, count, dtype.is_none() ? nullptr : names);
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }
};

// What a hole in the arguments is filled with: What of pykernels/cpp/__init__.py.
enum What : int { kAddress, kStart, kStrides, kRows };

// A part of the arguments.
struct Part {
  bool is_hole = false;
  What what = kAddress;
  size_t index = 0;
  py::object constant;      // if it holds no hole
  std::vector<Part> items;  // else, of a list or a tuple
  bool is_list = false;
};

class Plan {
 public:
  // Args:
  //   hole: the type of holes, tuples (index, what)
  //   results: (sizes, dtype) of each result, or None for one that is not wanted
  //   arguments: nested lists and tuples with holes, whose index counts the tensors, then results
  //   count: of tensors
  Plan(const Exchange& exchange, const py::type& hole, const py::list& results,
       const py::object& arguments, size_t count)
      : exchange_(exchange), count_(count), needs_(count + results.size()) {
    for (const py::handle result : results) {
      Result made;
      if (!result.is_none()) {
        const auto given = py::reinterpret_borrow<py::tuple>(result);
        for (const py::handle size : py::tuple(given[0]))
          made.sizes.push_back(py::reinterpret_borrow<py::object>(size));
        made.dtype = given[1];
        if (made.sizes.size() > Result::kMostAxes) throw std::invalid_argument("too many axes");
      }
      results_.push_back(std::move(made));
    }
    arguments_ = parse(arguments, hole);
  }

  // (results, arguments, None), or None where a tensor does not lie as the kernel wants it.
  py::object make(const py::tuple& tensors) const {
    if (tensors.size() != count_) throw std::invalid_argument("another number of tensors");
    std::vector<dlpack::Tensor> memory(needs_.size());
    for (size_t i = 0; i < count_; ++i) {
      const py::handle tensor = tensors[i];
      if (tensor.is_none()) continue;
      const Needs& needs = needs_[i];
      if (!exchange_.read(tensor, &memory[i]) || (needs.row_major && !row_major(memory[i])) ||
          (needs.rows_dense && !rows_dense(memory[i])) || !exchange_.signed_as_stored(tensor))
        return py::none();
    }
    py::tuple results(results_.size());
    for (size_t i = 0; i < results_.size(); ++i) {
      py::object made = results_[i].empty(tensors[0]);
      if (!made.is_none() && !exchange_.read(made, &memory[count_ + i])) return py::none();
      results[i] = std::move(made);
    }
    return py::make_tuple(results, fill(arguments_, memory), py::none());
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
      needs_.at(index).rows_dense |= part.what == kRows;
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

  static py::object fill(const Part& part, const std::vector<dlpack::Tensor>& memory) {
    if (part.constant) return part.constant;
    if (part.is_hole) {
      const dlpack::Tensor& t = memory[part.index];
      switch (part.what) {
        case kAddress:
        case kStart: return py::int_(address_of(t));
        case kStrides: return strides(t, t.ndim, true);
        case kRows: return py::make_tuple(address_of(t), strides(t, 3, false));
      }
    }
    if (part.is_list) {
      py::list found(part.items.size());
      for (size_t i = 0; i < part.items.size(); ++i) found[i] = fill(part.items[i], memory);
      return std::move(found);
    }
    py::tuple found(part.items.size());
    for (size_t i = 0; i < part.items.size(); ++i) found[i] = fill(part.items[i], memory);
    return std::move(found);
  }

  const Exchange exchange_;
  const size_t count_;
  std::vector<Needs> needs_;  // of tensors, then results
  std::vector<Result> results_;
  Part arguments_;
};

}  // namespace

// plan: makes a function of what Plan::make takes, of a type of tensors and what Plan takes; None
// where that type does not say in C where its tensors are.
void bind_plan(py::module_& m) {
  m.def("plan",
        [](const py::type& tensor_type, const py::type& hole, const py::list& results,
           const py::object& arguments, size_t count) -> py::object {
          const Exchange exchange(tensor_type);
          if (!exchange.usable()) return py::none();
          const auto plan = std::make_shared<Plan>(exchange, hole, results, arguments, count);
          return py::cpp_function([plan](const py::tuple& tensors) { return plan->make(tensors); });
        });
}

}  // namespace pykernels

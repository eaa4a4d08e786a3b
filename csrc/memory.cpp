// Where tensors have their memory: for launchers, which would ask each of them in Python.
#include <array>

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

// What `describe` returns of each tensor, and of None, in a list; or None where `fits` or its sign
// says of one that its memory is not what it looks like.
template <class Fits, class Describe>
py::object read(const Exchange& exchange, const py::tuple& tensors, const Fits& fits,
                const Describe& describe) {
  py::list found(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::handle object = tensors[i];
    dlpack::Tensor tensor{};
    if (!object.is_none() &&
        !(exchange.read(object, &tensor) && fits(tensor) && signed_as_stored(object)))
      return py::none();
    found[i] = describe(tensor);
  }
  return std::move(found);
}

}  // namespace

// memory_readers: of a type of tensors, two functions of a tuple of them, and of None; or None
// where it has no exchange functions. The first returns their addresses if all are row-major, the
// second pairs of address and first three strides if the last axis of each is contiguous; or None.
void bind_memory(py::module_& m) {
  m.def("memory_readers", [](const py::type& tensor_type) -> py::object {
    const Exchange exchange(tensor_type);
    if (!exchange.usable()) return py::none();
    const auto flat = [exchange](const py::tuple& tensors) {
      return read(exchange, tensors, row_major,
                  [](const dlpack::Tensor& t) { return py::int_(address_of(t)); });
    };
    const auto rows = [exchange](const py::tuple& tensors) {
      const auto dense = [](const dlpack::Tensor& t) {
        const int32_t last = t.ndim - 1;
        return last == 3 && (t.strides[last] == 1 || t.shape[last] == 1);
      };
      return read(exchange, tensors, dense, [](const dlpack::Tensor& t) {
        const bool some = t.strides;
        const auto stride = [&](int axis) { return some ? t.strides[axis] : 0; };
        return py::make_tuple(address_of(t), py::make_tuple(stride(0), stride(1), stride(2)));
      });
    };
    return py::make_tuple(py::cpp_function(flat), py::cpp_function(rows));
  });
}

}  // namespace pykernels

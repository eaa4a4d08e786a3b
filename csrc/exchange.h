// What C asks of torch: where tensors have their memory, and for new ones.
//
// torch 2.10 and newer offer the exchange functions of DLPack 1.2, a table of C functions beside
// the Python protocol of the same name. Declared here is as much of it as is used, after
// https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind.h"

namespace pykernels {

namespace dlpack {

constexpr uint32_t kMajor = 1;  // tables of another major version are laid out otherwise
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const Type& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  Type dtype;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim], in elements
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major, minor;
  const ExchangeTable* previous;               // of an older version, or nullptr
  void *allocate, *managed_from, *managed_to;  // not used here
  // What a Python tensor has, valid for as long as that tensor; 0, or -1 with a Python error.
  int (*tensor_from)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace dlpack

// Whether a function without arguments says yes.
inline bool ask(py::handle function) {
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function.ptr()));
  if (!answer) throw py::error_already_set();
  const int found = PyObject_IsTrue(answer.ptr());
  if (found < 0) throw py::error_already_set();
  return found;
}

class Exchange {
 public:
  // Of a type of tensors; unusable where it has no such functions, or none of this version.
  explicit Exchange(const py::type& type) : is_neg_(type.attr("is_neg")) {
    const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), kName)) return;
    table_ = static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), kName));
    while (table_ && table_->major > dlpack::kMajor) table_ = table_->previous;
    if (table_ && (table_->major < dlpack::kMajor || !table_->tensor_from)) table_ = nullptr;
  }

  bool usable() const { return table_; }

  // Whether `object` is a tensor in memory that `out` then describes.
  bool read(py::handle object, dlpack::Tensor* out) const {
    if (table_->tensor_from(object.ptr(), out) != 0) {
      PyErr_Clear();
      return false;
    }
    return out->strides && (out->data || empty(*out));
  }

  // Whether a tensor has the signs that its memory has: torch may keep a minus to itself.
  bool signed_as_stored(py::handle tensor) const {
    PyObject* const argument = tensor.ptr();
    PyObject* const answer = PyObject_Vectorcall(is_neg_.ptr(), &argument, 1, nullptr);
    if (!answer) throw py::error_already_set();
    Py_DECREF(answer);
    return answer == Py_False;
  }

 private:
  static bool empty(const dlpack::Tensor& t) {
    for (int32_t axis = 0; axis < t.ndim; ++axis)
      if (t.shape[axis] == 0) return true;
    return false;
  }

  static constexpr const char* kName = "dlpack_exchange_api";
  const py::object is_neg_;  // unbound, to be found once
  const dlpack::ExchangeTable* table_ = nullptr;
};

// Makes tensors that are not initialised.
class Allocator {
 public:
  // Of ALLOCATOR of pykernels/cpp/__init__.py: a function of sizes, strides and dtype that makes a
  // tensor on the CPU, or None; and one that says whether torch is to fill such tensors.
  explicit Allocator(const py::tuple& functions) : make_(functions[0]), filled_(functions[1]) {}

  // Whether the function serves now.
  bool quick() const { return !make_.is_none() && !ask(filled_); }

  // A tensor on the CPU; if not `quick`, by a method of `like`, which takes twice as long.
  py::object make(py::handle sizes, py::handle strides, py::handle dtype, py::handle like,
                  bool quick) const {
    static PyObject* const method = PyUnicode_InternFromString("new_empty_strided");
    static PyObject* const names = py::make_tuple("dtype").release().ptr();
    PyObject* const by_function[] = {sizes.ptr(), strides.ptr(), dtype.ptr()};
    PyObject* const by_method[] = {like.ptr(), sizes.ptr(), strides.ptr(), dtype.ptr()};
    PyObject* const made = quick ? PyObject_Vectorcall(make_.ptr(), by_function, 3, nullptr)
                                 : PyObject_VectorcallMethod(method, by_method, 3, names);
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

 private:
  const py::object make_, filled_;
};

inline Address address_of(const dlpack::Tensor& t) {
  return reinterpret_cast<Address>(t.data) + t.byte_offset;
}

inline dlpack::Type exchange_type(int dtype) {
  switch (dtype) {
    case kFloat32: return {dlpack::kFloat, 32, 1};
    case kFloat64: return {dlpack::kFloat, 64, 1};
    case kBFloat16: return {dlpack::kBfloat, 16, 1};
    case kFloat16: return {dlpack::kFloat, 16, 1};
  }
  throw std::invalid_argument("unknown dtype code");
}

}  // namespace pykernels

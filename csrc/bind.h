// What every bind_<op> needs: tensors arrive as integers, data_ptr() or 0 for none, and a dtype.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "core/vec.h"

namespace pykernels {

namespace py = pybind11;

using Address = std::uintptr_t;

template <class S>
S* pointer(Address address) {
  return reinterpret_cast<S*>(address);
}

// The order is that of DTYPES in pykernels/cpp/__init__.py.
enum Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

template <class S>
struct Tag {
  using type = S;
};

// Calls body(Tag<storage type>) without the GIL.
template <class Body>
void dispatch(int dtype, const Body& body) {
  const py::gil_scoped_release release;
  switch (dtype) {
    case kFloat32: return body(Tag<float>{});
    case kFloat64: return body(Tag<double>{});
    case kBFloat16: return body(Tag<bf16>{});
    case kFloat16: return body(Tag<f16>{});
  }
  throw std::invalid_argument("unknown dtype code");
}

void bind_probe(py::module_& m);
void bind_plan(py::module_& m);
void bind_signature(py::module_& m);
void bind_rnn(py::module_& m);
void bind_gru(py::module_& m);
void bind_lstm(py::module_& m);
void bind_attention(py::module_& m);
void bind_attention_varlen(py::module_& m);
void bind_linear_cross_entropy(py::module_& m);

}  // namespace pykernels

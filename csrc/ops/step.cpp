// Takes torch's tensors apart for a step on packed weights.
#include "step.h"

#include <memory>

namespace pykernels {

PackedStep::PackedStep(StepKernel kernel, int states, const py::type& tensor_type,
                       const Exchange& exchange, const Allocator& allocator,
                       const py::tuple& weights, const py::object& values, int dtype, int64_t I,
                       int64_t H)
    : kernel_(kernel), states_(states), tensor_type_(tensor_type), exchange_(exchange),
      allocator_(allocator), values_(values), torch_dtype_(weights[0].attr("dtype")), dtype_(dtype),
      type_(exchange_type(dtype)), I_(I), H_(H), weights_(weights.size()) {
  dlpack::Tensor packed;
  if (!exchange_.read(values, &packed)) throw std::invalid_argument("values are no tensor");
  packed_ = address_of(packed);
  for (size_t i = 0; i < weights_.size(); ++i)
    if (!look_at(weights[i], &weights_[i])) throw std::invalid_argument("a weight is no tensor");
}

py::object PackedStep::run(const py::tuple& weights, int threads, py::handle x,
                           const py::tuple& before, bool relu) const {
  dlpack::Tensor tensor;
  if (!unchanged(weights) || before.size() != size_t(states_) || !plain(x, I_, &tensor))
    return py::none();
  const int32_t ndim = tensor.ndim;
  const int64_t B = ndim == 2 ? tensor.shape[0] : 1;
  const auto is_state = [&](py::handle object) {
    return plain(object, H_, &tensor) && tensor.ndim == ndim && (ndim == 1 || tensor.shape[0] == B);
  };
  StepCall call{};
  call.dtype = dtype_;
  call.threads = threads;
  call.sizes = {1, B, I_, H_, H_};
  call.relu = relu;
  call.in[0] = address_of(tensor);
  call.in[7] = packed_;
  Address* const from[] = {&call.in[5], &call.c};
  for (int s = 0; s < states_; ++s) {
    const py::handle state = before[s];
    if (state.is_none()) continue;
    if (!is_state(state)) return py::none();
    *from[s] = address_of(tensor);
  }
  Address* const to[] = {&call.out[0], &call.c_next};
  py::tuple sizes(ndim), strides(ndim);
  sizes[ndim - 1] = py::int_(H_);
  strides[ndim - 1] = py::int_(1);
  if (ndim == 2) {
    sizes[0] = py::int_(B);
    strides[0] = sizes[1];
  }
  const bool quick = allocator_.quick();
  py::tuple after(states_);
  for (int s = 0; s < states_; ++s) {
    py::object next = allocator_.make(sizes, strides, torch_dtype_, x, quick);
    if (!exchange_.read(next, &tensor)) return py::none();
    *to[s] = address_of(tensor);
    after[s] = std::move(next);
  }
  kernel_(call);
  return std::move(after);
}

bool PackedStep::Seen::operator==(const Seen& other) const {
  return is_none == other.is_none && version == other.version && address == other.address &&
         type == other.type && ndim == other.ndim && shape == other.shape &&
         strides == other.strides;
}

bool PackedStep::look_at(py::handle weight, Seen* seen) const {
  *seen = {};
  seen->is_none = weight.is_none();
  if (seen->is_none) return true;
  dlpack::Tensor tensor;
  if (!exchange_.read(weight, &tensor) || tensor.ndim > 2) return false;
  seen->address = address_of(tensor);
  seen->type = tensor.dtype;
  seen->ndim = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, seen->shape.begin());
  std::copy_n(tensor.strides, tensor.ndim, seen->strides.begin());
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(weight.ptr(), name));
  if (version) seen->version = PyLong_AsLongLong(version.ptr());
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an inference tensor has no version
  return false;
}

bool PackedStep::unchanged(const py::tuple& weights) const {
  if (weights.size() != weights_.size()) return false;
  for (size_t i = 0; i < weights_.size(); ++i) {
    Seen now;
    if (!look_at(weights[i], &now) || !(now == weights_[i])) return false;
  }
  return true;
}

bool PackedStep::plain(py::handle object, int64_t columns, dlpack::Tensor* out) const {
  if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()) ||
      !exchange_.read(object, out) || out->device_type != dlpack::kCpu || !(out->dtype == type_))
    return false;
  const int last = out->ndim - 1;
  if ((last != 0 && last != 1) || out->shape[last] != columns || out->strides[last] != 1 ||
      (last == 1 && out->strides[0] != columns))
    return false;
  return exchange_.signed_as_stored(object);
}

void bind_step(py::module_& m, const std::string& op, StepKernel kernel, int states) {
  m.def((op + "_step").c_str(),
        [kernel, states](const py::type& tensor_type, const py::tuple& allocator,
                         const py::tuple& weights, const py::object& values, int dtype, int64_t I,
                         int64_t H) -> py::object {
          const Exchange exchange(tensor_type);
          if (!exchange.usable()) return py::none();
          const auto step =
              std::make_shared<PackedStep>(kernel, states, tensor_type, exchange,
                                           Allocator(allocator), weights, values, dtype, I, H);
          return py::cpp_function(
              [step](const py::tuple& weights, int threads, py::handle x, const py::tuple& before,
                     bool relu) { return step->run(weights, threads, x, before, relu); });
        });
}

}  // namespace pykernels

// One step of a recurrent cell on packed weights, from torch's tensors to torch's tensors.
//
// A step of a small cell takes a microsecond or two. So does a handful of the questions that Python
// would ask of its tensors first; here they take a tenth of that.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "../exchange.h"
#include "recurrent_bind.h"

namespace pykernels {

// What the kernel of a cell takes; the arrays are those of recurrent_forward.
struct StepCall {
  int dtype, threads;
  RecurrentShape sizes;
  std::array<Address, 8> in;
  std::array<Address, 2> out;
  Address c, c_next;  // of an lstm
  bool relu;          // of an rnn
};

using StepKernel = void (*)(const StepCall&);

class PackedStep {
 public:
  // Args:
  //   kernel: of the op
  //   states: how many it has
  //   tensor_type: torch.Tensor
  //   exchange: of that type, usable
  //   allocator: of the states after a step
  //   weights: those that were packed, as they are now; None for a bias that is not there
  //   values: the tensor into which they were packed
  //   dtype: of the weights
  PackedStep(StepKernel kernel, int states, const py::type& tensor_type, const Exchange& exchange,
             const Allocator& allocator, const py::tuple& weights, const py::object& values,
             int dtype, int64_t I, int64_t H);

  // The tuple of the states after a step from the states `before`, each a tensor [B, H] or None, on
  // the input x [B, I]; or without B, all of them. None where the weights have changed since they
  // were packed, or a tensor is anything but a plain one that fits: the way through all checks says
  // what.
  py::object run(const py::tuple& weights, int threads, py::handle x, const py::tuple& before,
                 bool relu) const;

 private:
  // What is other once a weight has been written to, or has other memory.
  struct Seen {
    bool is_none;
    int64_t version;
    Address address;
    dlpack::Type type;
    int32_t ndim;
    std::array<int64_t, 2> shape, strides;

    bool operator==(const Seen& other) const;
  };

  // False where that cannot be said.
  bool look_at(py::handle weight, Seen* seen) const;
  bool unchanged(const py::tuple& weights) const;
  // Whether `object` is a torch.Tensor [any, columns] or [columns] of the cell's dtype on the CPU,
  // row-major and with the signs that its memory has.
  bool plain(py::handle object, int64_t columns, dlpack::Tensor* out) const;

  const StepKernel kernel_;
  const int states_;
  const py::type tensor_type_;
  const Exchange exchange_;
  const Allocator allocator_;
  const py::object values_, torch_dtype_;
  const int dtype_;
  const dlpack::Type type_;
  const int64_t I_, H_;
  Address packed_;
  std::vector<Seen> weights_;
};

// <op>_step: makes a function of what PackedStep::run takes, of an op with so many states; None
// where torch lacks what that needs.
void bind_step(py::module_& m, const std::string& op, StepKernel kernel, int states);

}  // namespace pykernels

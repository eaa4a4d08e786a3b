// What a call looks like: all that its checks ask of its arguments, in bytes.
//
// Python takes some microseconds to ask, as long as a small kernel runs. What it has found of one
// call holds for every other that looks the same, and a look takes a tenth of that.
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "exchange.h"

namespace pykernels {
namespace {

template <class T>
void put(const T& value, std::string* to) {
  to->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// Of a tensor; all bytes are of its values.
struct Looks {
  int32_t device_type, device_id, ndim;
  dlpack::Type dtype;
};

// Whether attribute `name` of `object` is true.
bool has(py::handle object, PyObject* name) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

class Signer {
 public:
  // Args:
  //   types: those of plain tensors, torch.Tensor first
  //   exchange: of the first of them, usable
  //   watched: functions without arguments, each true if somebody wants to see the call
  //   recording: a function without arguments, true if autograd is on
  //   surroundings: a context variable, whose value stands for a first option that is None
  Signer(const py::tuple& types, const Exchange& exchange, const py::tuple& watched,
         const py::object& recording, const py::object& surroundings)
      : types_(types), exchange_(exchange), watched_(watched), recording_(recording),
        surroundings_(surroundings) {}

  // Of a call with these tensors, or None in their places, and these options: `first` and others,
  // each a number, a string, None, or a tuple of them. It begins with 1 if autograd records the
  // call, or else with 0. Empty if there is something out of the ordinary: nothing is known of such
  // a call.
  std::string sign(const py::tuple& tensors, py::handle first, const py::tuple& others) const {
    for (const py::handle is_watched : watched_)
      if (ask(is_watched)) return {};
    std::string found;
    found.reserve(512);  // of a dozen tensors
    found.push_back('\0');
    bool differentiable = false;
    for (const py::handle tensor : tensors)
      if (!add_tensor(tensor, &differentiable, &found)) return {};
    if (!(first.is_none() ? add_surroundings(&found) : add_option(first, &found))) return {};
    if (!add_option(others, &found)) return {};
    found[0] = differentiable && ask(recording_);
    return found;
  }

 private:
  bool add_surroundings(std::string* to) const {
    PyObject* value = nullptr;
    if (PyContextVar_Get(surroundings_.ptr(), nullptr, &value) != 0) throw py::error_already_set();
    return add_option(py::reinterpret_steal<py::object>(value), to);
  }

  bool is_plain(py::handle object) const {
    for (const py::handle type : types_)
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr()) return true;
    return false;
  }

  bool add_tensor(py::handle tensor, bool* differentiable, std::string* to) const {
    to->push_back(tensor.is_none() ? 'N' : 't');
    if (tensor.is_none()) return true;
    dlpack::Tensor t;
    if (!is_plain(tensor) || !exchange_.read(tensor, &t)) return false;
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    const bool is_differentiable = has(tensor, requires_grad);
    *differentiable |= is_differentiable;
    to->push_back(is_differentiable ? '1' : '0');
    put(Looks{t.device_type, t.device_id, t.ndim, t.dtype}, to);
    to->append(reinterpret_cast<const char*>(t.shape), t.ndim * sizeof(*t.shape));
    return true;
  }

  // Numbers of other types are other numbers: True is not 1 to a check.
  static bool add_option(py::handle option, std::string* to) {
    PyObject* const object = option.ptr();
    if (object == Py_None || object == Py_True || object == Py_False) {
      to->push_back(object == Py_None ? 'N' : object == Py_True ? 'T' : 'F');
    } else if (PyFloat_CheckExact(object)) {
      to->push_back('f');
      put(PyFloat_AS_DOUBLE(object), to);
    } else if (PyLong_CheckExact(object)) {
      int overflow = 0;
      const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
      if (overflow) return false;
      to->push_back('i');
      put(value, to);
    } else if (PyUnicode_CheckExact(object)) {
      Py_ssize_t size = 0;
      const char* const text = PyUnicode_AsUTF8AndSize(object, &size);
      if (!text) {  // half a surrogate pair
        PyErr_Clear();
        return false;
      }
      to->push_back('s');
      put(size, to);
      to->append(text, size);
    } else if (PyTuple_CheckExact(object)) {
      to->push_back('(');
      put(PyTuple_GET_SIZE(object), to);
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(object); ++i)
        if (!add_option(PyTuple_GET_ITEM(object, i), to)) return false;
    } else {
      return false;
    }
    return true;
  }

  const py::tuple types_;
  const Exchange exchange_;
  const py::tuple watched_;
  const py::object recording_, surroundings_;
};

// What was found of calls, by their signatures: the last ones.
class Memory {
 public:
  explicit Memory(size_t capacity) : capacity_(capacity) {}

  // None where nothing is kept.
  py::object find(std::string_view signature) {
    const auto place = places_.find(signature);
    if (place == places_.end()) return py::none();
    calls_.splice(calls_.begin(), calls_, place->second);
    return place->second->second;
  }

  void keep(const std::string& signature, const py::object& found) {
    if (places_.count(signature)) return;  // another thread was first
    calls_.emplace_front(signature, found);
    places_[calls_.front().first] = calls_.begin();
    if (places_.size() <= capacity_) return;
    places_.erase(calls_.back().first);
    calls_.pop_back();
  }

 private:
  using Calls = std::list<std::pair<const std::string, py::object>>;
  const size_t capacity_;
  Calls calls_;  // the last one first
  std::unordered_map<std::string_view, Calls::iterator> places_;
};

}  // namespace

// signer: of what Signer takes, the functions
//   sign: (tensors, first, others) -> Signer::sign in bytes
//   memory: (capacity) -> find and keep of a Memory, the first of the same
// or None where torch lacks what that needs.
void bind_signature(py::module_& m) {
  m.def("signer",
        [](const py::tuple& types, const py::tuple& watched, const py::object& recording,
           const py::object& surroundings) -> py::object {
          const Exchange exchange{py::type(types[0])};
          if (!exchange.usable()) return py::none();
          const auto signer =
              std::make_shared<Signer>(types, exchange, watched, recording, surroundings);
          const py::cpp_function sign(
              [signer](const py::tuple& tensors, py::handle first, const py::tuple& others) {
                return py::bytes(signer->sign(tensors, first, others));
              });
          const py::cpp_function memory([signer](size_t capacity) {
            const auto made = std::make_shared<Memory>(capacity);
            return py::make_tuple(
                py::cpp_function([signer, made](const py::tuple& tensors, py::handle first,
                                                const py::tuple& others) {
                  return made->find(signer->sign(tensors, first, others));
                }),
                py::cpp_function([made](const std::string& signature, const py::object& found) {
                  made->keep(signature, found);
                }));
          });
          return py::make_tuple(sign, memory);
        });
}

}  // namespace pykernels

// The Python module, built once for each instruction set: _C_baseline, _C_avx2, _C_avx512.
#include <string>

#if defined(__linux__)
#include <pthread.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "bind.h"
#include "core/parallel.h"

namespace pykernels {
namespace {

#if defined(__x86_64__)
// Not every compiler knows this feature by name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Whether this processor, and the operating system on it, runs the build named `isa`.
bool cpu_runs(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == "baseline";
}

std::string compiler() {
#if defined(__clang__)
  return "clang++ " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}

}  // namespace
}  // namespace pykernels

PYBIND11_MODULE(PYKERNELS_MODULE, m) {
  using namespace pykernels;
  m.doc() = "CPU kernels of pykernels for one instruction set.";
  m.def("cpu_runs", &cpu_runs, py::arg("isa"));
  m.attr("compiler") = compiler();
#if defined(__linux__)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  bind_probe(m);
  bind_plan(m);
  bind_signature(m);
  bind_rnn(m);
  bind_gru(m);
  bind_lstm(m);
  bind_attention(m);
  bind_attention_varlen(m);
  bind_linear_cross_entropy(m);
}

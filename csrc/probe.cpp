// What tests and benchmarks measure the core by: its functions one by one, and the machine's rates.
#include <chrono>
#include <string>

#include "bind.h"
#include "core/gemm.h"
#include "core/units.h"

namespace pykernels {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Multiply-adds on registers alone, in as many chains as fill the units. The numbers are volatile,
// or the compiler would find a chain that stands still and leave it out.
template <class T>
int64_t multiply_adds(int64_t rounds) {
  constexpr int chains = 12;
  vec<T> sum[chains];
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) sum[i] = broadcast(T(i));
  const volatile T half = T(0.5), one = T(1);
  const vec<T> factor = broadcast(T(half)), term = broadcast(T(one));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) sum[i] = sum[i] * factor + term;
    asm volatile("");  // the loop stays as written
  }
  vec<T> total{};
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) total += sum[i];
  volatile T sink = reduce_add(total);
  (void)sink;
  return rounds * chains * lanes<T>;
}

// Floating-point operations a second, a multiply-add counted as two.
template <class T>
double fma_rate(int threads, double seconds) {
  std::atomic<int64_t> total{0};
  const auto start = Clock::now();
  parallel(threads, [&](const Team&) {
    int64_t mine = 0;
    while (seconds_since(start) < seconds) mine += multiply_adds<T>(100000);
    total += mine;
  });
  return 2.0 * static_cast<double>(total) / seconds_since(start);
}

// Bytes read plus bytes written a second, copying `bytes` from one buffer to another.
double copy_rate(int threads, int64_t bytes, double seconds) {
  const Scratch<char> from(bytes), to(bytes);
  std::memset(from.get(), 1, bytes);
  std::memset(to.get(), 1, bytes);
  std::atomic<int64_t> total{0};
  const auto start = Clock::now();
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(bytes, kCacheLine);
    int64_t copied = 0;
    while (seconds_since(start) < seconds) {
      std::memcpy(to.get() + mine.begin, from.get() + mine.begin, mine.size());
      copied += 2 * mine.size();
    }
    total += copied;
  });
  return static_cast<double>(total) / seconds_since(start);
}

// Reads numbers once, each thread its share of them in order: what of a kernel that has to read
// them is left when it does nothing with them.
void read(int threads, const float* from, int64_t count) {
  constexpr int kSums = 8;
  parallel(threads, [&](const Team& team) {
    const Range mine = team.share(count, kSums * lanes<float>);
    vec<float> sums[kSums] = {};
    for (int64_t i = mine.begin; i + kSums * lanes<float> <= mine.end; i += kSums * lanes<float>)
#pragma GCC unroll 8
      for (int x = 0; x < kSums; ++x) sums[x] += load(from + i + x * lanes<float>);
    for (int x = 1; x < kSums; ++x) sums[0] += sums[x];
    volatile float sink = reduce_add(sums[0]);
    (void)sink;
  });
}

// Whether a team of two counts as crowded after so many meetings to which one comes `late`.
bool two_are_crowded(int64_t meetings, std::chrono::microseconds late,
                     std::chrono::microseconds patience) {
  std::atomic<bool> crowded{false};
  parallel(2, [&](const Team& team) {
    for (int64_t i = 0; i < meetings && team.size == 2; ++i) {
      const auto start = Clock::now();
      while (team.rank == 0 && Clock::now() - start < late) spin_pause();
      team.barrier->wait(team.size, patience);
      if (team.barrier->crowded()) crowded = true;
    }
  });
  return crowded;
}

template <class T, class Function>
void map(const T* in, T* out, int64_t n, const Function& function) {
  for (int64_t i = 0; i < n; i += lanes<T>)
    store_n(out + i, function(load_n(in + i, n - i)), n - i);
}

// Several registers at a time, as recurrent cells have it.
template <class T, class Function>
void map_units(const T* in, T* out, int64_t n, const Function& function) {
  for (int64_t i = 0; i < n; i += kPanel<T>)
    store_units(out + i, function(load_units(in + i, n - i)), n - i);
}

template <class T>
void vec_math(const std::string& name, const T* in, T* out, int64_t n) {
  if (name == "exp") return map(in, out, n, exp<T>);
  if (name == "exp2_normal")
    return map(in, out, n, [](vec<T> x) {
      vec<T> one[1] = {x};
      exp2_normal<T>(one);
      return one[0];
    });
  if (name == "exp2_softmax") return map(in, out, n, exp2_softmax<T>);
  if (name == "tanh") return map_units(in, out, n, [](Units<T> x) { return tanh(x); });
  if (name == "sigmoid") return map_units(in, out, n, [](Units<T> x) { return sigmoid(x); });
  throw std::invalid_argument("vec_math: unknown function " + name);
}

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, const T* b, T* c) {
  const Gemm<T> product(1, n, k);
  product.run(Team{0, 1, nullptr}, {m, n, k}, View<T>{a, k, 1}, View<T>{b, n, 1}, false, c, n);
}

// Runs body(Tag<float or double>).
template <class Body>
auto by_name(const std::string& dtype, const Body& body) {
  const py::gil_scoped_release release;
  if (dtype == "float32") return body(Tag<float>{});
  if (dtype == "float64") return body(Tag<double>{});
  throw std::invalid_argument("dtype must be float32 or float64, got " + dtype);
}

}  // namespace

void bind_probe(py::module_& m) {
  m.def(
      "fma_rate",
      [](const std::string& dtype, int threads, double seconds) {
        return by_name(dtype, [&](auto tag) {
          return fma_rate<typename decltype(tag)::type>(threads, seconds);
        });
      },
      py::arg("dtype"), py::arg("threads"), py::arg("seconds"));
  m.def(
      "copy_rate",
      [](int threads, int64_t bytes, double seconds) {
        const py::gil_scoped_release release;
        return copy_rate(threads, bytes, seconds);
      },
      py::arg("threads"), py::arg("bytes"), py::arg("seconds"));
  m.def("read", [](int threads, Address from, int64_t count) {
    const py::gil_scoped_release release;
    read(threads, pointer<const float>(from), count);
  });
  m.def("two_are_crowded", [](int64_t meetings, int64_t late, int64_t patience) {  // in us
    const py::gil_scoped_release release;
    return two_are_crowded(meetings, std::chrono::microseconds(late),
                           std::chrono::microseconds(patience));
  });
  m.def("scratch_peak", [] { return FreeBlocks::of_this_thread().peak(); });
  m.def("vec_math",
        [](const std::string& name, const std::string& dtype, Address in, Address out, int64_t n) {
          by_name(dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            vec_math(name, pointer<const T>(in), pointer<T>(out), n);
          });
        });
  m.def("gemm", [](const std::string& dtype, int64_t m_, int64_t n, int64_t k, Address a, Address b,
                   Address c) {
    by_name(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      gemm(m_, n, k, pointer<const T>(a), pointer<const T>(b), pointer<T>(c));
    });
  });
}

}  // namespace pykernels

"""Builds the C++ kernels, once for each instruction set of this kind of processor.

Everything else about the package is in pyproject.toml. Neither torch nor a BLAS is linked.
``CXX`` names another compiler.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"baseline": []}

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/plan.cpp",
    "csrc/probe.cpp",
    "csrc/signature.cpp",
    "csrc/core/gemm.cpp",
    "csrc/ops/attention.cpp",
    "csrc/ops/attention_backward.cpp",
    "csrc/ops/attention_few.cpp",
    "csrc/ops/attention_few_backward.cpp",
    "csrc/ops/attention_forward.cpp",
    "csrc/ops/attention_panels.cpp",
    "csrc/ops/attention_varlen.cpp",
    "csrc/ops/gru.cpp",
    "csrc/ops/linear_cross_entropy.cpp",
    "csrc/ops/lstm.cpp",
    "csrc/ops/rnn.cpp",
    "csrc/ops/step.cpp",
]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    # One rounding in a multiply-add: the kernels are written for it. Nothing else of fast-math.
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-DNDEBUG",  # else pybind11 asks for the GIL at every reference that it counts
]


def stop(message: str) -> None:
    """Ends the build in one line."""
    sys.exit(f"pykernels: {message}")


def compiler() -> str:
    """The C++ compiler to use: $CXX, or the first of c++, g++ and clang++ that is there."""
    asked = os.environ.get("CXX")
    for name in [shlex.split(asked)[0]] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return asked or name
    return stop(
        f"no C++ compiler found ({asked or 'c++, g++, clang++'}); install g++ 11 or clang++ 14 or "
        "newer, or set CXX"
    )


def compiles(cxx: str, program: str, *flags: str) -> bool:
    """Whether the compiler builds `program`, headers and libraries included."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(program)
        command = [*shlex.split(cxx), *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True).returncode == 0


class BuildKernels(build_ext):
    """build_ext with objects kept apart by instruction set, and failures told in one line."""

    def build_extensions(self):
        cxx = compiler()
        if not compiles(
            cxx, "#include <optional>\nint main() { if constexpr (true) return 0; }", "-std=c++17"
        ):
            stop(f"{cxx} does not compile C++17; install g++ 11 or clang++ 14 or newer, or set CXX")
        threads = ["-fopenmp"]
        if not compiles(
            cxx, "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }", *threads
        ):
            print(f"pykernels: {cxx} has no OpenMP; the kernels will use one thread", flush=True)
            threads = []
        self.compiler.set_executables(
            compiler_so=f"{cxx} -fPIC",
            compiler_so_cxx=f"{cxx} -fPIC",
            linker_so=f"{cxx} -shared",
            linker_so_cxx=f"{cxx} -shared",
        )
        for extension in self.extensions:
            extension.extra_compile_args += threads
            extension.extra_link_args += threads
        from pybind11.setup_helpers import ParallelCompile

        with ParallelCompile():  # as many sources at a time as there are cores
            super().build_extensions()

    def build_extension(self, ext):
        try:
            objects = self.compiler.compile(
                ext.sources,
                output_dir=os.path.join(self.build_temp, ext.name),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
            )
            target = self.get_ext_fullpath(ext.name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            self.compiler.link_shared_object(
                objects, target, extra_postargs=ext.extra_link_args, target_lang="c++"
            )
        except Exception as error:
            told = str(error).partition("\n")[0]
            if len(told) > 200:  # a command, with all its flags
                told = f"{told[:100]} ... {told[-60:]}"
            stop(f"building {ext.name} failed (the compiler's messages stand above): {told}")


def kernels(isa: str, flags: list[str]) -> Extension:
    """The extension module for one instruction set."""
    import pybind11

    return Extension(
        f"pykernels._C_{isa}",
        SOURCES,
        define_macros=[("PYKERNELS_MODULE", f"_C_{isa}")],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*FLAGS, *flags],
        language="c++",
    )


setup(
    ext_modules=[kernels(isa, flags) for isa, flags in ISAS.items()],
    cmdclass={"build_ext": BuildKernels},
)

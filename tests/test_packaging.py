"""What is built and shipped: the wheel, made without torch, and what a build says that fails."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TREE = ("csrc", "kernels", "pykernels", "LICENSE", "README.md", "pyproject.toml", "setup.py")


def extensions():
    """The extension modules by instruction set, as setup.py states them."""
    from distutils.core import run_setup

    import setuptools  # noqa: F401  brings distutils

    before = os.getcwd()
    os.chdir(ROOT)
    try:
        modules = run_setup("setup.py", stop_after="init").ext_modules
    finally:
        os.chdir(before)
    return {module.name.rpartition("_C_")[2]: module for module in modules}


def test_wheel(tmp_path):
    """One wheel: what is inside, its metadata, and that it runs installed."""
    wheel = build(tmp_path)
    holds_every_module(wheel)
    holds_an_extension_for_each_instruction_set(wheel)
    says_what_it_needs(wheel)
    links_no_torch(wheel, tmp_path / "unpacked")
    installs_and_runs(wheel, tmp_path / "installed")


def compiler(path, of_objects, of_modules=":"):
    """A script for CXX that runs one of two commands where a compiler writes a file, "$out".

    What setup.py tries a compiler with, it takes.
    """
    path.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        for argument do
            [ "$before" = -o ] && out=$argument
            before=$argument
        done
        case $out in
        *.o) {of_objects} ;;
        *{sysconfig.get_config_var("EXT_SUFFIX")}) {of_modules} ;;
        esac
        """)
    )
    path.chmod(0o755)
    return str(path)


def build(folder):
    """A wheel built from a copy of the tree, by the real setup.py, where importing torch fails.

    The modules in it are those that the set-up of these tests compiled: the compiler copies them.
    """
    pytest.importorskip("pybind11")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, folder / "tree" / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, folder / "tree" / name)
    cxx = compiler(folder / "cxx", ': > "$out"', f'cp "{ROOT}/pykernels/${{out##*/}}" "$out"')
    without = folder / "without" / "torch"
    without.mkdir(parents=True)
    (without / "__init__.py").write_text("raise ImportError('the build must not need torch')")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--isolated",  # from the variables that the Makefile sets for pip
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-v",
            "-w",
            str(folder),
            str(folder / "tree"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": cxx, "PYTHONPATH": str(folder / "without")},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (built,) = folder.glob("*.whl")
    return built


def names(wheel):
    return zipfile.ZipFile(wheel).namelist()


def holds_every_module(wheel):
    """kernels/ is inside as pykernels.kernels and nowhere else; no source, test or benchmark is."""
    inside = {name for name in names(wheel) if name.endswith(".py")}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "pykernels").rglob("*.py")}
    here |= {f"pykernels/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert inside == here
    assert "pykernels/py.typed" in names(wheel)
    top = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pykernels"}


def holds_an_extension_for_each_instruction_set(wheel):
    built = [name for name in names(wheel) if name.endswith((".so", ".pyd"))]
    stems = {re.match(r"pykernels/_C_([^.]+)\.", name).group(1) for name in built}
    assert stems == set(extensions())
    assert "baseline" in stems


def says_what_it_needs(wheel):
    (name,) = (name for name in names(wheel) if name.endswith(".dist-info/METADATA"))
    text = zipfile.ZipFile(wheel).read(name).decode()
    assert "\nName: pykernels\n" in text
    assert "\nRequires-Python: >=3.10" in text
    required = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", text, re.M)
    runtime = {package: rest for package, rest in required if "extra ==" not in rest}
    assert set(runtime) == {"torch", "numpy"}
    assert "==" not in runtime["torch"]
    extras = set(re.findall(r"^Provides-Extra: (\w+)", text, re.M))
    assert {"triton", "test", "bench", "examples"} <= extras


def links_no_torch(wheel, folder):
    """Nor a BLAS: the C and C++ runtimes and OpenMP are all that the kernels need."""
    tool = shutil.which("ldd")
    if tool is None:
        return
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if "_C_baseline" in n)
        path = archive.extract(name, folder)
    linked = subprocess.run([tool, path], capture_output=True, text=True).stdout
    needed = set(re.findall(r"^\s*(lib[a-zA-Z0-9+_]+)", linked, re.M))
    runtimes = {"libstdc++", "libc++", "libm", "libgcc_s", "libc", "libpthread", "libdl"}
    assert needed <= runtimes | {"libgomp", "libomp"}, needed


def installs_and_runs(wheel, folder):
    """Installed into an empty folder and run from another one, the backends answer."""
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(wheel)], check=True, capture_output=True)
    top = [path.name for path in folder.iterdir() if path.suffix != ".dist-info"]
    assert top == ["pykernels"]
    program = """
        import importlib.util, sys
        sys.path.insert(0, TARGET)
        import torch, pykernels
        from pykernels.testing import check
        from pykernels.testing.specs import find
        assert pykernels.__file__.startswith(TARGET), pykernels.__file__
        for name in ("rnn-plain", "attention-mask-2d"):
            for backend in ("cpp", "reference"):
                check(find(name), torch.float32, backend)
        if importlib.util.find_spec("triton"):
            import pykernels.kernels
            assert pykernels.kernels.__file__.startswith(TARGET)
    """
    program = textwrap.dedent(program).replace("TARGET", repr(str(folder)))
    hidden = ("PYTHONPATH", "PYKERNELS_ISA", "PYKERNELS_BACKEND")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={k: v for k, v in os.environ.items() if k not in hidden},
    )
    assert done.returncode == 0, done.stderr


# The least and the most of vec.h and gemm.h: two sources take in all that differs.
@pytest.mark.parametrize(
    ("cxx", "isa", "sources"),
    [
        ("clang++", "baseline", ["csrc/probe.cpp", "csrc/core/gemm.cpp"]),
        ("clang++", "avx512", None),
        ("g++-11", "avx512", ["csrc/probe.cpp", "csrc/core/gemm.cpp"]),  # the oldest that is served
    ],
)
def test_other_compilers_have_no_warning(cxx, isa, sources):
    """Under -Wall -Wextra -Werror; with the usual g++ .ci/run builds the kernels so."""
    if shutil.which(cxx) is None:
        pytest.skip(f"{cxx} is not here")
    pytest.importorskip("pybind11")
    module = extensions().get(isa)
    if module is None:
        pytest.skip(f"no {isa} build on this kind of machine")
    folders = [*module.include_dirs, sysconfig.get_paths()["include"]]
    done = subprocess.run(
        [cxx, "-fsyntax-only", "-Werror", *module.extra_compile_args]
        + [f"-isystem{folder}" for folder in folders]
        + [f"-D{name}={value}" for name, value in module.define_macros]
        + (sources or module.sources),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_kernels_is_no_package_of_its_own():
    """Found as `kernels` in the root of the tree, where it may hide another's package, it is empty.

    Hugging Face transformers asks a package of that name for its version.
    """
    program = """
        import kernels
        assert getattr(kernels, "__version__", "none") == "none"
        try:
            import kernels.rnn
        except ModuleNotFoundError:
            kernels.rnn
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode
    assert "import pykernels.kernels" in done.stderr.splitlines()[-1]


def failing_build(folder, cxx):
    """The last line on stderr of a build with a compiler that is not up to it."""
    pytest.importorskip("pybind11")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(folder), "-t", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CXX": cxx},
    )
    assert done.returncode
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_missing_compiler_is_one_line(tmp_path):
    last = failing_build(tmp_path, "no-such-compiler")
    assert last.startswith("pykernels: no C++ compiler found (no-such-compiler)")


def test_an_old_compiler_is_one_line(tmp_path):
    assert failing_build(tmp_path, "false").startswith("pykernels: false does not compile C++17")


def test_a_failed_build_is_one_line(tmp_path):
    last = failing_build(tmp_path, compiler(tmp_path / "cxx", "exit 1"))
    assert re.match(r"pykernels: building pykernels\._C_\w+ failed \(the compiler's messages", last)
    assert len(last) < 300


def mypy(*files):
    """What mypy says of files; of those that pyproject.toml names, if none are given."""
    pytest.importorskip("mypy")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *files], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_types_are_complete():
    """Of all that others call: --strict, and no module left out."""
    inner = {"reference", "cpp", "testing", "_version"}
    public = [path.relative_to(ROOT / "pykernels") for path in (ROOT / "pykernels").rglob("*.py")]
    count = sum(path.parts[0].removesuffix(".py") not in inner for path in public)
    assert f"no issues found in {count} source files" in mypy()


def test_types_are_what_a_program_needs(tmp_path):
    """A program in strict mode gets tensors, not this or that."""
    program = """
        from torch import Tensor, nn
        from typing_extensions import assert_type

        import pykernels
        from pykernels import functional as F


        def run(x: Tensor, w: Tensor, model: nn.Module) -> Tensor:
            assert_type(F.rnn(x, w, w), tuple[Tensor, Tensor])
            assert_type(F.gru(x, w, w), tuple[Tensor, Tensor])
            assert_type(F.lstm(x, w, w), tuple[Tensor, tuple[Tensor, Tensor]])
            assert_type(F.lstm(x, w, w, return_cell_states=True)[2], Tensor)
            maybe: bool = x.requires_grad
            assert_type(F.lstm(x, w, w, return_cell_states=maybe)[0], Tensor)
            assert_type(F.attention(x, x, x, return_lse=maybe), Tensor | tuple[Tensor, Tensor])
            either = F.attention_varlen(x, x, x, x, return_lse=maybe)
            assert_type(either, Tensor | tuple[Tensor, Tensor])
            assert_type(F.rnn_cell(x, None, w, w), Tensor)
            assert_type(F.gru_cell(x, None, w, w), Tensor)
            assert_type(F.lstm_cell(x, None, w, w), tuple[Tensor, Tensor])
            assert_type(F.attention(x, x, x), Tensor)
            assert_type(F.attention(x, x, x, return_lse=True), tuple[Tensor, Tensor])
            assert_type(F.scaled_dot_product_attention(x, x, x), Tensor)
            assert_type(F.attention_varlen(x, x, x, x), Tensor)
            assert_type(F.attention_varlen(x, x, x, x, return_lse=True), tuple[Tensor, Tensor])
            assert_type(F.linear_cross_entropy(x, w, x), Tensor)
            assert_type(pykernels.replace_modules(model, verbose=True), nn.Module)
            assert_type(pykernels.restore_modules(model), nn.Module)
            layer: nn.LSTM = pykernels.nn.LSTM(3, 4, num_layers=2, batch_first=True)
            attention: nn.MultiheadAttention = pykernels.nn.MultiheadAttention(8, 2)
            with pykernels.activate(), pykernels.use_backend("cpp"):
                return attention.out_proj.weight * layer.num_layers
    """
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    mypy(str(path))


def test_torch_is_new_enough():
    """The floor in pyproject.toml is not above what the tests run on."""
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    assert version >= tuple(map(int, floor.split(".")))

"""`python -m pykernels`: what this machine will run, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import textwrap

import torch

from pykernels import __version__, _backends

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_OPS = ("rnn", "gru", "lstm", "attention", "attention_varlen", "linear_cross_entropy")


def main() -> None:
    """Prints one screen of plain text."""
    argparse.ArgumentParser("python -m pykernels", description=__doc__).parse_args()
    _backends.check_environment()
    for title, facts in (
        ("Versions", versions()),
        ("Machine", machine()),
        ("Backends", backends()),
    ):
        print(title)
        width = max(map(len, facts))
        for name, value in facts.items():
            first = f"  {name:<{width}}  "
            rest = " " * len(first)
            print(textwrap.fill(value, 100, initial_indent=first, subsequent_indent=rest))


def versions() -> dict[str, str]:
    """What is installed; "not installed" where it is not."""
    return {
        "pykernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "compiler": compiler(),
    }


def machine() -> dict[str, str]:
    """The processor and what of it is used."""
    isa = instruction_set()
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads changes it)",
        "kernels": "none" if isa == "none" else f"{isa} build, {_chosen_by()}",
        "torch uses": torch.backends.cpu.get_cpu_capability(),
    }
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts | {"GPU": ", ".join(gpus) or "none that torch can use"}


def backends() -> dict[str, str]:
    """What each backend serves here, or why it serves nothing."""
    facts = {}
    for name in _backends.BACKENDS:
        reason = _backends.available(name)
        if reason:
            facts[name] = f"unavailable: {reason}"
            continue
        ops: dict[str, list[str]] = {}  # by the dtypes that are served, mostly the same
        for op in _OPS:
            if _backends.has(name, op):
                ops.setdefault(", ".join(_served(name, op)), []).append(op)
        facts[name] = "; ".join(f"{', '.join(of)} in {dtypes}" for dtypes, of in ops.items())
    return (
        facts
        | {"default": _default("cpu")}
        | ({"default, GPU": _default("cuda")} if torch.cuda.is_available() else {})
    )


def serving(
    op: str,
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    features: frozenset[str] = frozenset(),
) -> str:
    """The name of the backend that `_backends.select` takes for such a call."""
    chosen = _backends.select(op, requested, device, dtype, features)
    package = chosen.__name__.split(".")[1]
    return {"kernels": "triton"}.get(package, package)


def processor() -> str:
    """The processor's model name, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The C++ kernels in use: "avx512", "avx2" or "baseline"; "none" where there are none."""
    try:
        return _backends.isa()
    except ImportError:
        return "none"


def compiler() -> str:
    """What the C++ kernels in use were compiled by."""
    try:
        return str(_backends.load_extension().compiler)
    except ImportError:
        return "none: there are no C++ kernels to run"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _served(backend: str, op: str) -> list[str]:
    served = _backends.module(backend, op).DTYPES
    return [name for name in _DTYPES if getattr(torch, name) in served]


def _default(device: str) -> str:
    """The backend that a plain call takes on `device`."""
    asked = os.environ.get("PYKERNELS_BACKEND")
    why = "asked for by PYKERNELS_BACKEND" if asked else "the fastest one that serves a call"
    try:
        return f"{serving('rnn', None, torch.device(device), torch.float32)}, {why}"
    except ValueError as error:
        return f"none: {error} ({why})" if asked else str(error)


def _chosen_by() -> str:
    forced = os.environ.get("PYKERNELS_ISA")
    return "forced by PYKERNELS_ISA" if forced else "the best one this processor runs"


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # PYKERNELS_BACKEND or PYKERNELS_ISA names what is not there
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""Imports run one way, and each layer sees only what it may.

nn -> functional -> ops -> {_backends, _checks} -> {reference | cpp | kernels} -> the C++ extension.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What the modules of each part may import of this package, and from outside beside the standard
# library.
PARTS = {
    "reference": (set(), {"torch"}),
    "kernels": (set(), {"torch", "triton"}),
    "cpp": ({"_backends"}, {"torch"}),
    "_checks": (set(), {"torch"}),
    "_backends": ({"_checks", "reference", "cpp", "kernels"}, {"torch"}),
    "_autocast": (set(), {"torch"}),
    "ops": ({"_autocast", "_backends", "_checks", "_version"}, {"torch"}),
    "functional": ({"ops"}, set()),
    "nn": ({"functional", "_autocast", "_checks"}, {"torch"}),
    "cost": (set(), set()),
    "diagnostics": ({"_checks"}, {"torch"}),
    "_version": (set(), set()),
    "testing": ({"functional", "ops", "reference"}, {"torch"}),
    "patch": ({"functional", "nn", "_backends", "_checks"}, {"torch"}),
    "integrations": ({"functional"}, {"torch", "transformers"}),
    "__init__": ({"functional", "nn", "patch", "_backends", "_version"}, {"torch"}),
    "__main__": ({"_backends", "_version", "__init__"}, {"torch"}),
}
FILES = sorted([*(ROOT / "pykernels").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def part(path):
    relative = path.relative_to(ROOT)
    return "kernels" if relative.parts[0] == "kernels" else relative.parts[1].removesuffix(".py")


def imports(path):
    """Parts of this package and top-level names of others in every import, at any depth."""
    inside, outside = set(), set()
    known = set(PARTS)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{path}: relative import beyond its own package"
            inside.add(part(path))
            continue
        elif isinstance(node, ast.ImportFrom):
            # "from pykernels import nn" names a part, "from pykernels import __version__" does not
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first != "pykernels":
                outside.add(first)
            else:
                inside.add(rest[0] if rest and rest[0] in known else "__init__")
    return inside, outside


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    own = part(path)
    assert own in PARTS, f"{own} is new: say here what it may import"
    inside, outside = imports(path)
    may, may_outside = PARTS[own]
    assert inside <= may | {own}, f"may import {sorted(may)} of pykernels, imports {sorted(inside)}"
    foreign = outside - set(sys.stdlib_module_names)
    assert foreign <= may_outside, f"may import {sorted(may_outside)}, imports {sorted(foreign)}"


def test_every_part_is_there():
    """An empty walk would pass the test above."""
    assert set(PARTS) <= {part(path) for path in FILES}


def test_no_circle():
    """The allowed imports themselves form no circle."""
    order, left = [], {name: set(inside) for name, (inside, _) in PARTS.items()}
    left["_backends"] -= {"cpp", "kernels", "reference"}  # loaded by name, when they are asked for
    while left:
        free = [name for name, inside in left.items() if not inside - set(order)]
        assert free, f"a circle among {sorted(left)}"
        order += free
        for name in free:
            del left[name]


SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_includes(path):
    """C++ sees no torch; headers see no Python, but for those at the boundary; intrinsics stay in
    vec.h."""
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text())
    assert not [name for name in included if name.startswith(("torch", "ATen", "c10"))]
    if path.suffix == ".h" and not re.fullmatch(r".*bind|exchange|step", path.stem):
        assert not [
            name
            for name in included
            if name.startswith("pybind11") or name in {"Python.h", "bind.h"}
        ]
    if path.name != "vec.h":
        assert not [name for name in included if name.endswith("intrin.h")]


def test_core_includes_only_core():
    for path in (ROOT / "csrc" / "core").iterdir():
        for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            beside = {other.name for other in path.parent.iterdir()}
            assert name in beside, f"{path.name} includes {name}"

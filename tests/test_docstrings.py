"""What `help` says of the public names."""

import inspect
import re

import pytest
import torch

import pykernels
from pykernels import functional, nn

FUNCTIONS = [name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))]


def sections(words):
    """The text of a docstring by its heads, "" being that before any."""
    found, head = {"": []}, ""
    for line in words.splitlines():
        if match := re.match(r"(Args|Parameters|Returns|Raises|Example)\b.*:$", line):
            head = match.group(1)
        found.setdefault(head, []).append(line)
    return {head: "\n".join(lines) for head, lines in found.items()}


def names(words):
    """Every name in a text."""
    return set(re.findall(r"\w+", words))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    """All arguments, shapes, errors; and where it is from, or the function that says so."""
    function = getattr(functional, name)
    said = sections(inspect.getdoc(function))
    whole = "\n".join(said.values())
    assert set(inspect.signature(function).parameters) <= names(whole)
    assert re.search(r"\[[A-Z.]", said["Args"])
    assert re.search(r"\[[A-Z.]|of the shapes? of|each like", said["Returns"])
    assert {"TypeError", "ValueError"} <= names(said["Raises"])
    others = [getattr(functional, other) for other in names(said[""]) & set(FUNCTIONS) - {name}]
    texts = [whole, *map(inspect.getdoc, others)]
    assert any(re.search(r"\([^()]*(19|20)\d\d[^()]*\)", text) for text in texts)


@pytest.mark.parametrize("name", [name for name in nn.__all__ if name.endswith(("Cell", "Loss"))])
def test_layers(name):
    """All arguments of the constructor, all parameters; its example runs."""
    layer = getattr(nn, name)
    said = sections(inspect.getdoc(layer))
    stock = layer if name.endswith("Loss") else getattr(torch.nn, name)
    assert set(inspect.signature(stock).parameters) <= names(said["Args"])
    assert {key for key, _ in layer(2, 3).named_parameters()} <= names(said["Parameters"])
    example = said["Example"].partition("\n")[2]
    exec(inspect.cleandoc(example), {"pykernels": pykernels, "torch": torch})


@pytest.mark.parametrize("name", nn.__all__)
def test_calls_of_layers(name):
    """What `forward` takes and returns, with shapes, and its errors."""
    forward = getattr(nn, name).forward
    said = sections(inspect.getdoc(forward))
    assert set(inspect.signature(forward).parameters) - {"self"} <= names(said["Args"])
    assert re.search(r"\[[A-Z.]", said["Args"])
    assert re.search(r"\[[A-Z.]", said["Returns"])
    assert {"TypeError", "ValueError"} <= names(said["Raises"])

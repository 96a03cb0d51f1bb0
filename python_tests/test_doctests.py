"""The examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import hflow_fast.models
import hflow_fast.nn
import hflow_fast.ops
import hflow_fast.testing

MODULES = [
    name
    for package in (hflow_fast.ops, hflow_fast.nn, hflow_fast.models, hflow_fast.testing)
    for _, name, is_package in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not is_package
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    names = {"torch": torch, "nn": torch.nn, "CouplingSpec": hflow_fast.ops.CouplingSpec}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = map(importlib.import_module, MODULES)
    assert sum(len(test.examples) for module in modules for test in finder.find(module)) >= 20

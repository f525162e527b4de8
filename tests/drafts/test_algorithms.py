"""Every installed draft algorithm has all that its interface asks for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from specbatch.config import Config, Data, Run, Target
from specbatch.config.algorithms import algorithm_class, algorithm_names, default_algorithm, draft_section
from specbatch.drafts.base import Algorithm, CaptureContract, Files, Module, algorithm_of
from specbatch.errors import UserError
from specbatch.target import read_target

ALGORITHMS = algorithm_names()


def made(name: str, target: Path) -> Algorithm:
    config = Config(
        run=Run(dir="run"), target=Target(path=str(target)), data=Data(train=["a.jsonl"]), draft=draft_section(name)()
    )
    return algorithm_of(config, read_target(target))


def methods(protocol: type) -> dict[str, inspect.Signature]:
    found = {name: value for name, value in vars(protocol).items() if not name.startswith("_") and callable(value)}
    return {name: inspect.signature(value) for name, value in found.items()}


def test_the_usual_algorithm_is_one_of_those_installed():
    assert default_algorithm() in ALGORITHMS


def test_an_unknown_algorithm_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"draft\.algorithm: there is no algorithm magic; there are .*eagle3"):
        algorithm_class("magic")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_whole_and_its_section_names_it(name, tiny_target):
    algorithm = made(name, tiny_target)
    assert algorithm.name == name == draft_section(name)().algorithm
    assert isinstance(algorithm.contract, CaptureContract)
    assert algorithm.contract.layers
    assert 1 <= algorithm.proposals <= len(algorithm.terms)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_its_files_and_its_module_take_what_is_given_to_them(name, tiny_target):
    algorithm = made(name, tiny_target)
    for protocol, kind in ((Files, type(algorithm.files)), (Module, algorithm.module())):
        for method, signature in methods(protocol).items():
            assert list(inspect.signature(getattr(kind, method)).parameters) == list(signature.parameters), method


@pytest.mark.parametrize("name", ALGORITHMS)
def test_its_costs_and_files_are_known_without_torch(name):
    code = f"import sys; from specbatch.config.algorithms import algorithm_class; algorithm_class({name!r}); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

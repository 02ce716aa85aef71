"""What the package gives is there, is documented, and is what its first page promises."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import dreamquant
from dreamquant import errors

MODULES = [info.name for info in pkgutil.walk_packages([str(Path(dreamquant.__file__).parent)], "dreamquant.")]


@pytest.mark.parametrize("name", dreamquant.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(dreamquant, name)

    assert inspect.getdoc(thing)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert thing.__module__.startswith("dreamquant.")


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_every_module_can_be_imported_alone_and_says_what_it_is(name: str) -> None:
    module = sys.modules.get(name) or import_module(name)
    assert module.__file__ is not None

    assert not Path(module.__file__).read_text() or module.__doc__


@pytest.mark.parametrize("name", dreamquant.__all__)
def test_arguments_of_public_functions_are_typed(name: str) -> None:
    thing = getattr(dreamquant, name)
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not signature.empty
        assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())


def test_every_error_is_one_that_can_be_caught_by_the_package() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]

    assert len(kinds) > 5
    assert all(issubclass(kind, dreamquant.DreamQuantError) for kind in kinds)


def test_the_version_is_the_distributions() -> None:
    assert dreamquant.__version__ == version("dreamquant")


def test_importing_it_imports_nothing_that_it_does_not_need() -> None:
    heavy = ["matplotlib", "sklearn", "timm", "torch._dynamo", "torchvision", "typer"]
    code = f"import sys, dreamquant; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"

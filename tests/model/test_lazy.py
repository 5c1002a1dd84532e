"""Packages hand on what they name, and import it when it is used."""

import inspect

import pytest

import infer
import model
import train


@pytest.mark.parametrize("package", [model, infer, train])
def test_every_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from {package.__name__} import nothing")
    names: dict = {}
    exec(f"from {package.__name__} import *", names)
    assert set(package.__all__) <= set(names)


def test_a_function_of_a_modules_name_stays_the_function():
    import infer.generate
    import infer.prepare

    assert inspect.isfunction(infer.generate)
    assert callable(infer.prepare)
    assert inspect.ismodule(model.accounting)

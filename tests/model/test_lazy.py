"""Packages import their public names when these are first used."""

import ast
import inspect
from pathlib import Path

import pytest

import infer
import model
import train
import train.run


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


@pytest.mark.parametrize("package", [model, infer, train, train.run])
def test_a_type_checker_sees_what_is_handed_on(package):
    path = Path(package.__file__)
    (branch,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    seen = {
        (node.module.removeprefix(package.__name__).removeprefix("."), alias.name)
        for node in branch.body
        for alias in node.names
    }
    (call,) = (node for node in ast.walk(branch) if isinstance(node, ast.Call))
    handed_on = ast.literal_eval(call.args[1])
    pairs = {(home, name) for home, names in handed_on.items() for name in names}
    assert seen == pairs | {("", home) for home, names in handed_on.items() if not names}
    assert {name for _, name in seen} <= set(package.__all__)
    for _, name in pairs:  # once that module is imported, the package has it in place of what is handed on
        assert not (path.parent / f"{name}.py").exists()
        assert not (path.parent / name / "__init__.py").exists()


def test_a_function_of_a_modules_name_stays_the_function():
    import infer.generate
    import infer.prepare

    assert inspect.isfunction(infer.generate)
    assert callable(infer.prepare)
    assert inspect.ismodule(model.accounting)

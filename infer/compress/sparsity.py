"""Prune matrices of the layers: set the entries with the lowest scores to zero. Trees keep the form of training."""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model import ModelConfig, Params, forward
from model.ambient import lenient
from model.errors import InputError, UnknownNameError, check_number
from model.layout import places
from model.linear import Linear
from model.parameterization import names_of, role_of
from model.weights import Transposed, is_weight

Method = Literal["magnitude", "wanda"]
Pattern = Literal["2:4"]

_EXPERTS = "experts"  # the stacked matrices of a mixture's experts


@lenient()
def prune(
    config: ModelConfig,
    params: Params,
    method: str = "magnitude",
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    calibration: Int[Array | np.ndarray, "batch seq"] | None = None,
) -> Params:
    """Return the parameters with the lowest-scoring entries of every matrix in the layers set to zero.

    sparsity: fraction of each output's inputs to remove, rounded down. pattern: "2:4" instead removes two of every four
    neighbouring inputs, which sparse tensor cores skip. Scores: "magnitude": |w|; "wanda": |w| · ‖x‖₂ of the input over
    the calibration tokens (Sun et al. 2023, section 3), all inputs taken from the unpruned model. Experts' matrices are
    always pruned by magnitude, since each expert sees other tokens. Embeddings, head, norms, biases and routers are not
    pruned.

    Raises InputError on a sparsity outside [0, 1), a number of inputs that the pattern does not divide, prepared
    parameters, and "wanda" without calibration tokens.
    """
    if method not in get_args(Method):
        raise UnknownNameError("pruning method", method, get_args(Method))
    if pattern is not None and pattern not in get_args(Pattern):
        raise UnknownNameError("pattern", pattern, get_args(Pattern))
    check_number("sparsity", sparsity, least=0, below=1, hint="0.5 sets half of the entries to zero")
    check_prunable(params)
    norms: dict[tuple[str, ...], Array] = {}
    if method == "wanda":
        if calibration is None:
            raise InputError('method "wanda" needs calibration tokens; give some, or use method "magnitude"')
        norms = input_norms(config, params, jnp.asarray(calibration))

    def prune_matrix(path: tuple[Any, ...], value: Any) -> Any:
        names = names_of(path)
        if "layers" not in names or role_of(names) not in ("hidden", "residual"):
            return value
        if pattern is not None and value.shape[-2] % 4:
            raise InputError(f"{'/'.join(names)} has {value.shape[-2]} inputs, which the pattern 2:4 does not divide")
        score = np.abs(np.asarray(value, np.float32))
        if method == "wanda" and _EXPERTS not in names[-2:]:
            score = score * np.asarray(norms[names[:-1]])[..., None]
        return jnp.where(_kept(score, sparsity, pattern), value, 0)

    return jax.tree_util.tree_map_with_path(prune_matrix, params)


def check_prunable(params: Params) -> None:
    """Raise InputError on prepared parameters, and on matrices in other stored forms."""
    if not isinstance(params.get("layers"), dict):
        raise InputError("pruning takes the parameters that init or training gives, not those of infer.prepare")
    if any(map(is_weight, jax.tree.leaves(params, is_leaf=is_weight))):
        raise InputError("pruning takes plain matrices; fold the adapters first (model.adapters.fold)")


def _kept(
    score: Float[np.ndarray, "*stack d_in d_out"], sparsity: float, pattern: str | None
) -> Bool[np.ndarray, "..."]:
    """Return which entries stay, chosen per output, or per output and group of four inputs; ties are arbitrary.

    Runs on the host, where selection takes linear time; XLA would sort.
    """
    columns = np.ascontiguousarray(np.swapaxes(score, -1, -2))
    d_in = columns.shape[-1]
    if pattern is None:
        group, removed = d_in, int(sparsity * d_in + 1e-9)
    else:
        group, removed = 4, 2
    grouped = columns.reshape(-1, group)
    kept = np.ones(grouped.shape, bool)
    if removed:
        lowest = np.argpartition(grouped, removed - 1, axis=-1)[:, :removed]
        np.put_along_axis(kept, lowest, False, axis=-1)
    return np.swapaxes(kept.reshape(columns.shape), -1, -2)


@lenient()
def input_norms(
    config: ModelConfig, params: Params, tokens: Int[Array, "batch seq"]
) -> dict[tuple[str, ...], Float[Array, "layers d_in"]]:
    """Return ‖x‖₂ over the tokens for every input of every `Linear` in the layers, by the path of its stacked weight.

    In an encoder-decoder both encoder and decoder read the tokens.
    """
    has_encoder = config.stack == "encoder-decoder"
    unstacked = params | {"layers": _unstacked(config, params["layers"], encoder=False)}
    if has_encoder:
        encoder = params["encoder"]
        unstacked["encoder"] = encoder | {"layers": _unstacked(config, encoder["layers"], encoder=True)}

    @jax.jit
    def squared_norms(params: Params) -> dict[tuple[str, ...], list[Array]]:
        """Return for each module path one entry per call of a `Linear` there, in the order of the calls."""
        squares: dict[tuple[str, ...], list[Array]] = {}

        def record_input(call, args, kwargs, context):
            if isinstance(context.module, Linear) and context.method_name == "__call__":
                x = args[0].astype(jnp.float32)
                squares.setdefault(context.module.path, []).append(jnp.sum(x * x, axis=tuple(range(x.ndim - 1))))
            return call(*args, **kwargs)

        inputs: dict[str, Any] = {"encoder_tokens": tokens} if has_encoder else {}
        with nn.intercept_methods(record_input):
            forward(config, params, tokens, outputs=("final_hidden",), **inputs)
        return squares

    squares = squared_norms(unstacked)
    norms: dict[tuple[str, ...], list[Array]] = {}
    # The encoder runs first. All layers have the same module paths, so each layer takes the first entry of its paths.
    for encoder in [True, False] if has_encoder else [False]:
        prefix = ("encoder", "layers") if encoder else ("layers",)
        layers = (unstacked["encoder"] if encoder else unstacked)["layers"]
        for (kind, _), tree in zip(places(config, encoder), layers, strict=True):
            for path in [path for path in squares if _has(tree, path)]:
                norms.setdefault((*prefix, kind, *path), []).append(jnp.sqrt(squares[path].pop(0)))
    return {path: jnp.stack(rows) for path, rows in norms.items()}


def _unstacked(config: ModelConfig, layers: Params, encoder: bool) -> tuple[Params, ...]:
    """Return one tree per layer, its matrices stored transposed.

    Plain matrices with the same input would be joined into one product, which bypasses their `Linear` modules.
    """

    def transposed(path: tuple[Any, ...], value: Any) -> Any:
        return Transposed(value.T) if names_of(path)[-1] == "weight" else value

    trees = []
    for name, index in places(config, encoder):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers[name])
        trees.append(jax.tree_util.tree_map_with_path(transposed, layer))
    return tuple(trees)


def _has(tree: Any, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return bool(path)

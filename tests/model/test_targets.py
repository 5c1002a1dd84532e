"""Programs for accelerators that are not here: every shape lowers, by a fused kernel where it takes the shape."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from infer import decode_step, init_cache, prefill
from model import Execution, InputError, ModelConfig, forward, init, presets
from model.kernels import AttentionShape, kernel_for, kernels_of
from model.sharding import AXES
from model.target import Target, target
from train import HParams, TrainConfig, init_state, train_step
from train.step import gradients

DEVICES = {"tpu": AbstractDevice("TPU v5", 1, "tpu"), "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")}
FUSED = {"tpu": "tpu_custom_call", "cuda": "__cudnn$fmha"}
BASE = ModelConfig(vocab_size=32, d_model=32, num_layers=1, num_heads=2, num_kv_heads=1, d_ff=32, max_seq_len=256)


@pytest.fixture(params=list(DEVICES))
def platform(request, monkeypatch):
    """Trace for one such device under a mesh of size 1."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)  # it would ask a device
    sizes, kinds = (1,) * len(AXES), (AxisType.Auto,) * len(AXES)
    with jax.sharding.use_abstract_mesh(
        AbstractMesh(sizes, AXES, axis_types=kinds, abstract_device=DEVICES[request.param])
    ):
        yield request.param


def lower(platform, function, *arguments):
    """The text of a program for that platform; `function` takes arrays only."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def ids(seq, rows=2):
    return jax.ShapeDtypeStruct((rows, seq), jnp.int32)


def training(platform, config, seq, segments=False):
    """The text of a step's gradients; the optimizer, which knows no platform, is left out."""
    train_config = TrainConfig(batch_size=2, seq_len=seq, segment_documents=segments, norms=False)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    batch = {"tokens": ids(seq), "targets": ids(seq)} | ({"segment_ids": ids(seq)} if segments else {})
    return lower(platform, functools.partial(gradients, config, train_config), params, batch, HParams())


def serving(platform, config, seq):
    """The texts of a prefill and of a decode step."""
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    cache = jax.eval_shape(lambda: init_cache(config, 2, seq + 1))
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    return [
        lower(platform, functools.partial(prefill, config), params, ids(seq), rows, cache),
        lower(platform, functools.partial(decode_step, config), params, rows, cache),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seq", [1, 7, 33, 128, 130])
def test_every_length_trains(platform, dtype, seq):
    """With packed documents and grouped heads; the fused kernel is there where it takes the length."""
    text = training(platform, BASE.replace(compute_dtype=dtype), seq, segments=True)
    fits = {"tpu": seq % 128 == 0, "cuda": dtype == "bfloat16" and seq % 2 == 0}
    assert (FUSED[platform] in text) == fits[platform]


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({"head_dim": 64}, {"tpu", "cuda"}),
        ({"head_dim": 128}, {"tpu", "cuda"}),
        ({"head_dim": 256}, {"tpu"}),  # Hopper takes it, but whether this is one only the device could say
        ({"head_dim": 192}, set()),
        ({"head_dim": 20}, {"tpu"}),
        ({"sliding_window": 16}, {"cuda"}),
        ({"num_kv_heads": 2, "attention_softcap": 5.0}, set()),
        ({"position": "alibi"}, set()),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_every_head_and_mask_trains(platform, change, fused):
    text = training(platform, BASE.replace(compute_dtype="bfloat16", **change), 128)
    assert (FUSED[platform] in text) == (platform in fused)


@pytest.mark.parametrize("name", ["tiny", "llama3.2-1b", "gpt2-small", "gemma2-2b"])
def test_presets_start_everywhere(platform, name):
    config = presets.get(name).replace(compute_dtype="bfloat16")
    config = config.replace(num_layers=len(config.layer_pattern))
    assert "stablehlo" in lower(platform, functools.partial(init, config), jax.random.key(0))
    seq = min(config.max_seq_len - 1, 33)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    lower(platform, lambda params, tokens: forward(config, params, tokens).logits, params, ids(seq))
    serving(platform, config, seq)


def test_x64_trains(platform):
    train_config = TrainConfig(batch_size=2, seq_len=128)
    with jax.enable_x64(True):
        state = jax.eval_shape(lambda: init_state(BASE, train_config, HParams()))
        batch = {"tokens": ids(128), "targets": ids(128)}
        step = functools.partial(train_step, BASE, train_config)
        assert "stablehlo" in lower(platform, step, state, batch, HParams())
        with pytest.raises(InputError, match="it does not run with jax_enable_x64"):
            kernel_for("pallas", AttentionShape(128, 64, "float32"))


def test_what_a_kernel_does_not_take_is_said(platform):
    """An init needs no kernel; a pass with one that was named raises, with the shape."""
    named = {"tpu": "pallas", "cuda": "cudnn"}[platform]
    config, execution = BASE.replace(compute_dtype="bfloat16"), Execution(attention_kernel=named)
    params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    message = {"tpu": "lengths are multiples of 128, not 33", "cuda": "sequences of an even length, not 33"}
    with pytest.raises(InputError, match=f"attention_kernel='{named}' cannot be used here: .*{message[platform]}"):
        jax.eval_shape(
            lambda params, tokens: forward(config, params, tokens, execution=execution).logits, params, ids(33)
        )


def test_the_mesh_says_the_platform(platform):
    assert target().platform == {"tpu": "tpu", "cuda": "gpu"}[platform]


@pytest.mark.parametrize(
    ("where", "kernel", "reason"),
    [
        (Target("gpu", (9, 0), "nvidia"), "cudnn", "takes this shape"),
        (Target("gpu", (10, 0), "nvidia"), "xla", "head_dim that is a multiple of 8 up to 128, not 256"),
        (Target("gpu", (7, 0), "nvidia"), "xla", "compute capability 8.0, not 7.0"),
        (Target("gpu", None, "amd"), "xla", "by NVIDIA, not by AMD"),
        (Target("cpu"), "xla", "no fused kernel runs on a cpu"),
        (Target("tpu"), "pallas", "takes this shape"),
    ],
)
def test_auto_says_why(where, kernel, reason):
    chosen, words = kernel_for("auto", AttentionShape(128, 256, "bfloat16"), where)
    assert chosen == kernel
    assert reason in words


def test_every_kind_of_layer_says_its_kernel(platform):
    config = BASE.replace(compute_dtype="bfloat16", num_layers=2, sliding_window=16, layer_pattern=("local", "global"))
    kernels = {name: kernel for name, (kernel, _) in kernels_of(config, 128).items()}
    local = {"tpu": "xla", "cuda": "cudnn"}[platform]
    assert kernels == {"local_dense": local, "dense": {"tpu": "pallas", "cuda": "cudnn"}[platform]}
    assert kernels_of(BASE.replace(position="alibi"), 128) == {
        "dense": ("xla", "no fused kernel supports position='alibi'")
    }


def test_pallas_on_a_cpu_takes_what_its_blocks_divide():
    """Interpreted; both passes."""
    for seq, head_dim in itertools.product((7, 16, 33, 64, 96, 128, 130), (8,)):
        shape = AttentionShape(seq, head_dim, "float32")
        if seq in (16, 64, 128):
            assert kernel_for("pallas", shape, Target("cpu"))[0] == "pallas"
        else:
            with pytest.raises(InputError, match=f"16, 32, 64 or multiples of 128, not {seq}"):
                kernel_for("pallas", shape, Target("cpu"))

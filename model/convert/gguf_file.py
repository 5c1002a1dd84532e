"""Read GGUF files of llama.cpp: weights of any of its types, dequantised."""

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from model.config import ModelConfig
from model.convert.builder import ParameterBuilder
from model.convert.gguf_architectures import ARCHITECTURES, Architecture
from model.convert.gguf_metadata import Metadata
from model.convert.plan import TensorPlan, plan_tensors, shapes_of
from model.dtypes import FLOATS, DTypeLike, dtype_name
from model.errors import InputError, UnknownNameError
from model.gguf_header import StoredTensor
from model.gguf_parts import read_gguf_parts
from model.parts import RopeScaling

_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(file: str | Path, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, dict]:
    """Read a GGUF file, or all files of a split model from any of them; quantised weights become `dtype`.

    Architectures: llama (also Mistral's and Mixtral's models), qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3 and
    gpt2. dtype: float32 or bfloat16. mesh: shards the parameters. Tensors are read one at a time. eos_token_ids are
    tokenizer.ggml.eos_token_id and, if present, the end-of-turn token.

    Raises InputError for files that are missing, truncated, big-endian or not GGUF, for other architectures, for
    unknown metadata of the architecture, and for tensors that are missing, unknown or of a wrong shape.
    """
    file = Path(file)
    dtype = dtype_name(dtype, FLOATS)
    values, tensors = _open(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    architecture = _architecture(file, values, shapes)
    with _errors_of(file):
        config = _config(architecture, Metadata(values["general.architecture"], values, shapes))
        if _ROPE_FACTORS in tensors:
            config = _with_factors(config, tensors[_ROPE_FACTORS].read())
        plan = plan_tensors(architecture.rules, config, shapes_of(config), tensors)
    _check_tensors(file, plan, shapes)
    builder = ParameterBuilder(shapes_of(config), dtype, mesh)
    for tensor in plan:
        builder.write(tensor, functools.partial(_read, architecture, config, tensor, tensors[tensor.name]))
    return config, builder.tree()


def read_gguf_config(file: str | Path) -> ModelConfig:
    """Return the config that a GGUF file's metadata give, without its tensors. Raises InputError as `load_gguf`."""
    file = Path(file)
    values, tensors = _open(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    architecture = _architecture(file, values, shapes)
    with _errors_of(file):
        return _config(architecture, Metadata(values["general.architecture"], values, shapes))


def _architecture(file: Path, values: Mapping[str, Any], shapes: Mapping[str, Any]) -> Architecture:
    name = values.get("general.architecture")
    if values.get("general.type", "model") != "model":
        raise InputError(f"{file} is not a model: its general.type is {values['general.type']!r}")
    if name not in ARCHITECTURES:
        raise UnknownNameError(f"architecture in {file}", str(name), ARCHITECTURES, guess=False)
    if not shapes:
        raise InputError(f"{file} has no weights; give the GGUF file of a model")
    return ARCHITECTURES[name]


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Begin the errors of reading metadata with the file's name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{file} has metadata of a wrong type ({error})") from None


class _QuantizedTensor:
    """A tensor of the file, not yet read. Raises InputError if the file ends before it does."""

    def __init__(self, file: Path, name: str, stored: StoredTensor):
        import gguf

        try:
            self.kind = gguf.GGMLQuantizationType(stored.kind)
        except ValueError:
            raise InputError(f"{file}: {name} has the type {stored.kind}, which gguf does not know") from None
        self.file, self.name, self.shape, self.start = file, name, stored.shape, stored.start
        values_of_block, bytes_of_block = gguf.GGML_QUANT_SIZES[self.kind]
        width = self.shape[-1] if self.shape else 1
        if width % values_of_block:
            raise InputError(
                f"{file} is cut off or broken: rows of {name} have {width} values, which is not a multiple of the "
                f"{values_of_block} of a block of the type {self.kind.name}"
            )
        self.bytes_of_row = width // values_of_block * bytes_of_block
        self.bytes = math.prod(self.shape[:-1]) * self.bytes_of_row
        if self.start + self.bytes > file.stat().st_size:
            raise InputError(
                f"{file} is cut off or broken: {name} ends at byte {self.start + self.bytes}, but the file has only "
                f"{file.stat().st_size}; fetch it again"
            )

    def read(self) -> Float[np.ndarray, "..."]:
        """Read and dequantise the tensor. Unlike a memory map, a read leaves no pages of the file in this process."""
        import gguf

        raw = np.fromfile(self.file, np.uint8, self.bytes, offset=self.start)
        # gguf dequantises 16 rows at a time, too few of the usual width for NumPy: give it up to 16 rows as one.
        bytes_of_joined_rows = math.gcd(math.prod(self.shape[:-1]), 16) * self.bytes_of_row
        try:
            return gguf.dequantize(raw.reshape(-1, bytes_of_joined_rows), self.kind).reshape(self.shape)
        except NotImplementedError:
            raise InputError(
                f"{self.file}: {self.name} has the type {self.kind.name}, which gguf cannot dequantise"
            ) from None


def _open(file: Path) -> tuple[dict[str, Any], dict[str, _QuantizedTensor]]:
    """Return the metadata, and the tensors by name."""
    if not file.is_file():
        raise InputError(f"{file} is not a file; give a GGUF file")
    parts = read_gguf_parts(file)
    for part, header in parts:
        if header.big_endian:
            raise InputError(f"the weights of {part} are big-endian, which is not supported; convert the model again")
    tensors = {
        name: _QuantizedTensor(part, name, stored) for part, header in parts for name, stored in header.tensors.items()
    }
    _, first_header = parts[0]
    return first_header.metadata, tensors


def _config(architecture: Architecture, data: Metadata) -> ModelConfig:
    values = architecture.read(data)
    data.check_rest()
    stops = [data.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = [int(token) for token in stops if token is not None and int(token) < values["vocab_size"]]
    return ModelConfig.from_dict({**values, "eos_token_ids": tuple(dict.fromkeys(known))})


def _check_tensors(file: Path, plan: list[TensorPlan], shapes: dict[str, tuple[int, ...]]) -> None:
    wanted = {tensor.name: tensor.shape for tensor in plan}
    for name, shape in wanted.items():
        if name not in shapes:
            raise InputError(f"{file} lacks the tensor {name}, which its metadata require")
        if shapes[name] != shape:
            raise InputError(f"the tensor {name} in {file} has shape {list(shapes[name])}; it should be {list(shape)}")
    for name in shapes:
        if name not in wanted and name != _ROPE_FACTORS:
            raise InputError(f"{file} has the tensor {name}, which its architecture does not have")


def _read(
    architecture: Architecture, config: ModelConfig, plan: TensorPlan, stored: _QuantizedTensor
) -> Float[np.ndarray, "..."]:
    """Return the tensor in the layout of Hugging Face.

    Norm scales are stored without the 1 that is added to them. The features of a head of size 4, which llama.cpp stores
    as the pairs (0, 2), (1, 3), are in the order 0, 1, 2, 3.
    """
    tensor, leaf = stored.read(), plan.slices[0].leaf
    if architecture.plus_one and leaf[-1] == "scale":
        return tensor - 1
    if architecture.interleaved and leaf[-2] in ("query", "key") and len(plan.slices) == 1:
        heads = config.num_heads if leaf[-2] == "query" else config.num_kv_heads
        pairs = tensor.reshape(heads, config.head_dim // 2, 2, *tensor.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def _with_factors(config: ModelConfig, factors: Float[np.ndarray, " pairs"]) -> ModelConfig:
    """Return the config with the scaling that gives these factors. Raises InputError if it has another one already."""
    if factors.shape != (config.rotary_dim // 2,):
        raise InputError(f"{_ROPE_FACTORS} has {factors.size} numbers; it should have {config.rotary_dim // 2}")
    scaling = llama3_scaling(factors, config)
    if scaling is not None and config.rope_scaling is not None:
        raise InputError(f"it has both {_ROPE_FACTORS} and a rope.scaling.factor, which is not supported")
    return config if scaling is None else config.replace(rope_scaling=scaling)


def llama3_scaling(factors: Float[np.ndarray, " pairs"], config: ModelConfig) -> RopeScaling | None:
    """Return the llama3 scaling that gives the divisors of rotary frequencies in rope_freqs.weight, None for all 1.

    The file has the divisors, not the parameters of the scaling. All known models have low_frequency_factor 1,
    high_frequency_factor 4 and a power of two as their original context. With the largest divisor as the factor, each
    such context is tried. Raises InputError if none gives the divisors.
    """
    factor = float(factors.max())
    if factor == 1 and factors.min() == 1:
        return None
    turns_per_token = config.rope_base ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    for exponent in range(3, 24):
        # Frequencies with at most 1 turn per context are divided by the factor, those with 4 or more are kept.
        kept = np.clip((2**exponent * turns_per_token - 1) / 3, 0, 1)
        divisors = 1 / ((1 - kept) / factor + kept)
        if np.allclose(divisors, factors, rtol=1e-4):
            return RopeScaling("llama3", round(factor, 6), original_max_seq_len=2**exponent)
    raise InputError(f"{_ROPE_FACTORS} does not come from a llama3 scaling that isoflop can recover")

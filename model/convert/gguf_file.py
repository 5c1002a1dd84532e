"""GGUF files, as llama.cpp writes them: weights of any of its types, dequantised."""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from model.config import ModelConfig
from model.convert.gguf_architectures import ARCHITECTURES, Architecture, Metadata
from model.convert.place import Places
from model.convert.plan import Step, shapes_of, steps
from model.dtypes import FLOATS, DTypeLike, dtype_name
from model.errors import InputError, UnknownNameError
from model.gguf_header import StoredTensor
from model.gguf_parts import read_gguf_parts
from model.parts import RopeScaling

_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(file: str | Path, *, dtype: DTypeLike = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, dict]:
    """Read a GGUF file, or the model in parts that it is a part of; quantised weights become `dtype`.

    Architectures: llama (also Mistral's and Mixtral's models), qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3 and
    gpt2. dtype: float32 or bfloat16. mesh: split the parameters over it. Tensors are read one at a time. eos_token_ids
    is the file's tokenizer.ggml.eos_token_id, and its end-of-turn token where it has one.

    Raises InputError on a file that is missing, cut off, big-endian or no GGUF, on other architectures, on metadata of
    the architecture that isoflop does not know, and on tensors that are missing, unknown or of a wrong shape.
    """
    file = Path(file)
    dtype = dtype_name(dtype, FLOATS)
    values, tensors = _open(file)
    name = values.get("general.architecture")
    if values.get("general.type", "model") != "model":
        raise InputError(f"{file} holds no model: its general.type is {values['general.type']!r}")
    if name not in ARCHITECTURES:
        raise UnknownNameError(f"architecture in {file}", str(name), ARCHITECTURES, guess=False)
    if not tensors:
        raise InputError(f"{file} holds no weights; give the GGUF file of a model")
    architecture = ARCHITECTURES[name]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = _config(architecture, Metadata(name, values, shapes))
        if _ROPE_FACTORS in tensors:
            config = _with_factors(config, tensors[_ROPE_FACTORS].read())
        plan = steps(architecture.rows, config, shapes_of(config), tensors)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{file} has metadata of a wrong type ({error})") from None
    _check_tensors(file, plan, shapes)
    places = Places(shapes_of(config), dtype, mesh)
    for step in plan:
        places.write(step, functools.partial(_read, architecture, config, step, tensors[step.name]))
    return config, places.tree()


class _Tensor:
    """A tensor of the file that has not been read yet. Raises InputError where its bytes are not all there."""

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
                f"{file} is cut off or broken: rows of {name} have {width} values, which are no whole blocks of "
                f"{values_of_block} of the type {self.kind.name}"
            )
        self.bytes_of_row = width // values_of_block * bytes_of_block
        self.bytes = math.prod(self.shape[:-1]) * self.bytes_of_row
        if self.start + self.bytes > file.stat().st_size:
            raise InputError(
                f"{file} is cut off or broken: {name} ends at byte {self.start + self.bytes}, but the file has only "
                f"{file.stat().st_size}; fetch it again"
            )

    def read(self) -> Float[np.ndarray, "..."]:
        """Read and dequantise. Reading by offset keeps the file's pages out of this process's memory."""
        import gguf

        raw = np.fromfile(self.file, np.uint8, self.bytes, offset=self.start)
        # gguf takes 16 rows at a time, which for rows of usual widths is too few to keep NumPy busy.
        joined = math.gcd(math.prod(self.shape[:-1]), 16) * self.bytes_of_row
        try:
            return gguf.dequantize(raw.reshape(-1, joined), self.kind).reshape(self.shape)
        except NotImplementedError:
            raise InputError(
                f"{self.file}: {self.name} has the type {self.kind.name}, which gguf cannot dequantise"
            ) from None


def _open(file: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata and the tensors."""
    if not file.is_file():
        raise InputError(f"{file} is not a file; give a GGUF file")
    parts = read_gguf_parts(file)
    for part, header in parts:
        if header.big_endian:
            raise InputError(f"the weights of {part} are big-endian, which is not supported; convert it anew")
    tensors = {name: _Tensor(part, name, stored) for part, header in parts for name, stored in header.tensors.items()}
    return parts[0][1].metadata, tensors


def _config(architecture: Architecture, data: Metadata) -> ModelConfig:
    values = architecture.read(data)
    data.check_rest()
    stops = [data.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = [int(token) for token in stops if token is not None and int(token) < values["vocab_size"]]
    return ModelConfig.from_dict({**values, "eos_token_ids": tuple(dict.fromkeys(known))})


def _check_tensors(file: Path, plan: list[Step], shapes: dict[str, tuple[int, ...]]) -> None:
    wanted = {step.name: step.shape for step in plan}
    for name, shape in wanted.items():
        if name not in shapes:
            raise InputError(f"{file} lacks the tensor {name}, which its metadata asks for")
        if shapes[name] != shape:
            raise InputError(f"the tensor {name} in {file} has shape {list(shapes[name])}; it should be {list(shape)}")
    for name in shapes:
        if name not in wanted and name != _ROPE_FACTORS:
            raise InputError(f"{file} holds the tensor {name}, which its architecture does not have")


def _read(architecture: Architecture, config: ModelConfig, step: Step, stored: _Tensor) -> np.ndarray:
    """The tensor as Hugging Face has it: halves of a head apart, norms without the one that is added."""
    tensor, leaf = stored.read(), step.parts[0].leaf
    if architecture.plus_one and leaf[-1] == "scale":
        return tensor - 1
    if architecture.permuted and leaf[-2] in ("query", "key") and len(step.parts) == 1:
        heads = config.num_heads if leaf[-2] == "query" else config.num_kv_heads
        pairs = tensor.reshape(heads, config.head_dim // 2, 2, *tensor.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def _with_factors(config: ModelConfig, factors: Float[np.ndarray, " half"]) -> ModelConfig:
    """Return the config with the scaling that the factors come from. Raises InputError where it has one already."""
    if factors.shape != (config.rotary_dim // 2,):
        raise InputError(f"{_ROPE_FACTORS} has {factors.size} numbers; it should have {config.rotary_dim // 2}")
    scaling = llama3_scaling(factors, config)
    if scaling is not None and config.rope_scaling is not None:
        raise InputError(f"it has both {_ROPE_FACTORS} and a rope.scaling.factor, which is not supported")
    return config if scaling is None else config.replace(rope_scaling=scaling)


def llama3_scaling(factors: Float[np.ndarray, " half"], config: ModelConfig) -> RopeScaling | None:
    """The llama3 scaling behind the numbers that rope_freqs.weight divides each rotary frequency by.

    The file holds these numbers and not where they come from. All models so far have low_frequency_factor 1,
    high_frequency_factor 4 and a power of two as original context, which with the largest number are checked to give
    all the others. Raises InputError where they do not.
    """
    factor = float(factors.max())
    if factor == 1 and factors.min() == 1:
        return None
    turns = config.rope_base ** (-np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # per token
    for exponent in range(3, 24):
        kept = np.clip((2**exponent * turns - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - kept) / factor + kept), factors, rtol=1e-4):
            return RopeScaling("llama3", round(factor, 6), original_max_seq_len=2**exponent)
    raise InputError(f"{_ROPE_FACTORS} does not come from a llama3 scaling that isoflop can recover")

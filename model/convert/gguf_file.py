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
from model.convert.huggingface import DTYPES
from model.convert.place import Places
from model.convert.plan import Step, shapes_of, steps
from model.errors import InputError, UnknownNameError
from model.parts import RopeScaling

_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(file: str | Path, *, dtype: str = "float32", mesh: Mesh | None = None) -> tuple[ModelConfig, dict]:
    """Read a GGUF file; its quantised weights become `dtype`, "float32" or "bfloat16".

    Architectures: llama (also Mistral's and Mixtral's models), qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3 and
    gpt2. mesh: split the parameters over it. Tensors are read one at a time. eos_token_ids is the file's
    tokenizer.ggml.eos_token_id, and its end-of-turn token where it has one.

    Raises InputError on a file that is missing, cut off or no GGUF, on other architectures and on what they have that
    isoflop does not, and on tensors that are missing, unknown or of a wrong shape.
    """
    file = Path(file)
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    values, tensors = _open(file)
    name = values.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnknownNameError(f"architecture in {file}", str(name), ARCHITECTURES)
    architecture = ARCHITECTURES[name]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        config = _config(architecture, Metadata(name, values, shapes))
        if _ROPE_FACTORS in tensors:
            config = config.replace(rope_scaling=llama3_scaling(tensors[_ROPE_FACTORS].read(), config))
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
    """A tensor of the file that has not been read yet, with the shape that it has dequantised."""

    def __init__(self, file: Path, tensor: Any):
        self.file, self.tensor = file, tensor
        self.shape = tuple(int(size) for size in reversed(tensor.shape))

    def read(self) -> Float[np.ndarray, "..."]:
        """Read and dequantise. Reading by offset keeps the file's pages out of this process's memory."""
        import gguf

        data = self.tensor.data
        raw = np.fromfile(self.file, np.uint8, int(self.tensor.n_bytes), offset=int(self.tensor.data_offset))
        raw = raw.view(data.dtype).reshape(data.shape)
        try:
            return gguf.dequantize(raw, self.tensor.tensor_type).reshape(self.shape)
        except NotImplementedError:
            kind = self.tensor.tensor_type.name
            raise InputError(f"{self.file}: {self.tensor.name} has the type {kind}, which gguf cannot read") from None


def _open(file: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata but for the vocabulary, and the tensors."""
    import gguf

    if not file.is_file():
        raise InputError(f"{file} is not a file; give a GGUF file")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(f"{file} is not a GGUF file")
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{file} is cut off or broken: {error}") from None
    long = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    values = {name: field.contents() for name, field in reader.fields.items() if name not in long}
    return values, {tensor.name: _Tensor(file, tensor) for tensor in reader.tensors}


def _config(architecture: Architecture, data: Metadata) -> ModelConfig:
    values = architecture.read(data)
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

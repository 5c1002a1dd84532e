"""What a model type is to the converters: its configuration's entries and its tensors' rows."""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from model.config import ModelConfig
from model.convert.fields import MOST, Entry, Field, Raw
from model.convert.rows import Row
from model.errors import InputError

_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
# Buffers that older files hold and that follow from the configuration.
_BUFFERS = (r"rotary_emb\.inv_freq$", r"position_ids$", r"\battn\.(masked_)?bias$")


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    prefixes: what may stand before the names of the base model's tensors; the first is written. renamed: (pattern,
    replacement) for names of older files. ignored: patterns of tensors that are known and not needed. ignores_beyond:
    tensors of layers beyond the last are not needed either (DeepSeek-V3's multi-token prediction). adapt: what the
    tensors' names say about the configuration.
    """

    model_type: str
    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    prefixes: tuple[str, ...] = ("model.",)
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    ignores_beyond: bool = False
    adapt: Callable[[ModelConfig, Collection[str]], ModelConfig] = lambda config, names: config

    def read(self, raw: Raw) -> ModelConfig:
        """The configuration that a config.json describes. Raises InputError on what is not supported."""
        values: dict[str, Any] = {}
        fields = [entry for entry in self.entries if isinstance(entry, Field)]
        raw = {**{field.theirs: raw.get(field.spelling or "", field.default) for field in fields}, **raw}
        for key in _LAYERS:  # others are checked when ModelConfig is made; lists as long as this one come before
            value = raw.get(key, 1)
            if value is not None and (type(value) is not int or not 1 <= value <= MOST):
                raise InputError(f"{key}={value!r} must be a whole number from 1 to {MOST}")
        try:
            if raw.get("quantization_config"):
                method = raw["quantization_config"].get("quant_method", "unnamed")
                raise InputError(
                    f"quantization_config with quant_method={method!r} is not supported; give full weights"
                )
            for entry in self.entries:
                values |= entry.read(raw)
            return ModelConfig.from_dict(values)
        except InputError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"it lacks a value or has one of a wrong type ({error})") from None

    def write(self, config: ModelConfig) -> Raw:
        """A config.json. Whether it says all that `config` says is for the caller to check."""
        raw: Raw = {"model_type": self.model_type}
        for entry in self.entries:
            raw |= entry.write(config)
        return raw

    def base_name(self, name: str) -> str:
        """A name of the file as the rows have it: in the newest spelling and without prefix."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        prefix = max((p for p in self.prefixes if name.startswith(p)), key=len, default="")
        return name[len(prefix) :]

    def written_name(self, row_name: str, outside: bool, config: ModelConfig) -> str:
        """The name that Transformers gives a tensor: its base model alone has no prefix."""
        prefixed = not outside and config.head != "none" and self.prefixes
        return f"{self.prefixes[0]}{row_name}" if prefixed else row_name

    def is_ignored(self, base_name: str, config: ModelConfig) -> bool:
        """Whether a tensor that no row asked for is known to be superfluous."""
        if any(re.search(pattern, base_name) for pattern in (*_BUFFERS, *self.ignored)):
            return True
        layer = re.match(r"layers\.(\d+)\.", base_name)
        return self.ignores_beyond and layer is not None and int(layer[1]) >= config.num_layers

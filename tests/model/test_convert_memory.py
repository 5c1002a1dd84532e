"""Loading to several devices, and in the memory of the model and one tensor."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from model import presets
from model.convert import huggingface, save_hf

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"

IN_SHARDS = """
import sys
from pathlib import Path
import jax, numpy as np
from flax import traverse_util
from model.convert import load_hf
from model.sharding import make_mesh

mesh = make_mesh({"fsdp": 2, "tensor": 2})
for folder in sys.argv[2:]:
    _, params = load_hf(folder, mesh=mesh)
    expected = dict(np.load(Path(sys.argv[1]) / f"{Path(folder).name}.npz"))
    leaves = traverse_util.flatten_dict(params, sep="/")
    assert leaves.keys() == expected.keys()
    held = 0
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[path])
        assert len(leaf.sharding.device_set) == 4
        spec = tuple(leaf.sharding.spec)
        assert "layers" not in path or spec[:1] in ((), (None,)), (path, spec)
        held += leaf.addressable_shards[0].data.size
    assert held < 0.3 * sum(leaf.size for leaf in leaves.values()), folder
"""


@pytest.mark.slow
def test_a_mesh_gets_every_tensor_in_its_shards(hf, tmp_path):
    names = ("phi3", "mixtral", "gpt2")
    for name in names:
        np.savez(tmp_path / f"{name}.npz", **traverse_util.flatten_dict(hf(name)[1], sep="/"))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-c", IN_SHARDS, str(tmp_path), *(str(FIXTURES / name) for name in names)]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr


PEAK = """
import gc, sys
import jax
from model.convert import load_hf

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

load_hf(sys.argv[1])  # compiles what the second call runs
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
config, params = load_hf(sys.argv[1])
largest = max(leaf.size // (leaf.shape[0] if "layers" in str(path) else 1) * 4
              for path, leaf in jax.tree_util.tree_leaves_with_path(params))
print(status("VmHWM") - status("VmRSS"), largest, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a process's memory")
def test_loading_takes_the_model_and_one_tensor(tmp_path):
    config = presets.get("tiny").replace(
        vocab_size=4000, d_model=1024, num_layers=3, num_heads=16, num_kv_heads=16, d_ff=2048, tie_embeddings=False
    )
    leaves = {path: np.full(shape, 0.5, np.float32) for path, shape in huggingface.shapes_of(config).items()}
    save_hf(config, jax.tree.map(jax.numpy.asarray, traverse_util.unflatten_dict(leaves)), tmp_path / "model")
    call = [sys.executable, "-c", PEAK, str(tmp_path / "model")]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    above, largest, model = map(int, done.stdout.split())
    assert model > 100e6
    assert above < 1.25 * largest

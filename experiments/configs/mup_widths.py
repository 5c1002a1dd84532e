"""Sweep the learning rate over widths, with heads of 16 features: does the best rate stay the same under muP?

isoflop sweep run study-32 --data data/sotu --out sweeps/mup --space experiments/configs/mup_widths.py --steps 250
--batch-size 4 --base parameterization=mup base_d_model=32 --seeds 2

42 trials of three shapes, 5.4M tokens, 1.07e13 FLOPs (6ND), as `isoflop sweep plan` reports for the same arguments,
with the hours on your machine.
"""

from experiments.sweep.space import derive, grid, logspace

space = derive(
    grid(d_model=[32, 64, 128], learning_rate=logspace(2.5e-3, 1.6e-1, 7)),
    lambda point: {"num_heads": point["d_model"] // 16, "d_ff": point["d_model"] * 21 // 8},
)

"""What a caller is told of a run."""

import dataclasses
from pathlib import Path

from model import Params
from train.run import load_run


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run went.

    status: finished, diverged or interrupted. loss: training cross-entropy of the last step, nats per token.
    validation_loss: on the fixed validation tokens at the run's end (None unless finished). epochs: passes over
    the training data; above 1 tokens were repeated. flops_6nd and flops_exact: of the whole run, by convention
    (see model/accounting.py), the trunk's part of a branch included; branch_step: the steps of that part, which the
    trunk has been charged for. skipped: steps that were not finite. seconds: training time without compilation, over
    all restarts.
    """

    run: Path
    status: str
    steps: int
    tokens: int
    epochs: float
    parameters: int
    flops_6nd: float
    flops_exact: float
    loss: float | None
    validation_loss: float | None
    seconds: float
    compile_seconds: float
    skipped: int = 0
    rollbacks: int = 0
    branch_step: int = 0

    @property
    def params(self) -> Params:
        """The parameters of the run's newest checkpoint."""
        return load_run(self.run)[1]

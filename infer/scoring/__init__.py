"""Log-probabilities of given continuations.

The package is not called `score`: importing it would replace the function `infer.score` by the package.
"""

from infer.scoring.scores import Scores, score

__all__ = ["Scores", "score"]

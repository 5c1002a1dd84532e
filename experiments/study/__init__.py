from experiments.study.run import Settings, run_study

__all__ = ["Settings", "run_study"]

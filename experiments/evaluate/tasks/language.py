"""Build tasks of language modelling: the last word of a passage."""

from experiments.evaluate.tasks.olmes import olmes
from experiments.evaluate.tasks.package import Package
from experiments.evaluate.tasks.protocols import shared_fields
from experiments.evaluate.tasks.task import Task


def lambada(package: Package, protocol: str) -> Task:
    """Return LAMBADA as prepared by OpenAI: 5,153 passages whose last word is predicted (arXiv:1606.06031).

    `greedy` is the published accuracy: each token of the word is the most likely one.
    """
    ready = olmes(package, "lambada", "bpb_0shot")
    return ready.replace(metric="greedy", chance=0.0, ready=False, **shared_fields(protocol))

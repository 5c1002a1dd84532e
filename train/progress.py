"""The progress bars of `model.progress`, under the name that training and experiments import them by."""

from model.progress import Advance, Patient, patient, progress_bar, progress_bar_if, say

__all__ = ["Advance", "Patient", "patient", "progress_bar", "progress_bar_if", "say"]

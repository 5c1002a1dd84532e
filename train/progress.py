"""Re-export the progress bars of `model.progress` for training and experiments."""

from model.progress import Advance, Patient, patient, progress_bar, progress_bar_if, say

__all__ = ["Advance", "Patient", "patient", "progress_bar", "progress_bar_if", "say"]

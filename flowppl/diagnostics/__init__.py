"""What comes after inference: verdicts and exports."""

from flowppl.diagnostics.arviz import inference_data
from flowppl.diagnostics.verdict import Verdict, diagnose

__all__ = ["Verdict", "diagnose", "inference_data"]

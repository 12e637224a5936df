"""What comes after inference: verdicts and exports."""

from flowppl.diagnostics.arviz import inference_data
from flowppl.diagnostics.calibration import Calibration
from flowppl.diagnostics.verdict import Verdict, diagnose

__all__ = ["Calibration", "Verdict", "diagnose", "inference_data"]

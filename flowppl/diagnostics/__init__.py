"""What comes after inference: exports."""

from flowppl.diagnostics.arviz import inference_data

__all__ = ["inference_data"]

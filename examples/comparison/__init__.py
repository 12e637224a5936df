"""Parts of the demo: the fits in each PPL, their scores, and the report."""

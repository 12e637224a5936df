"""The two models of the demo, once in each PPL with the same site names, with their data and reference posteriors."""

def report(v): return v.verdict + "\n  " + "\n  ".join(v.reasons)

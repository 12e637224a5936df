"""A verdict as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flowppl.diagnostics.verdict import Verdict

_ROWS = 10


def report(v: Verdict) -> str:
    """The verdict, its reasons, the numbers of every check, and a table of the coordinates in most doubt."""
    e, t = v.evidence, v.reweighting
    facts = [
        ("draws", f"{v.num_draws}" + (f", {v.num_undefined} undefined" if v.num_undefined else "")),
        ("ELBO", f"{e.elbo:.3f} ± {e.elbo_error:.3f}"),
        ("log evidence", f"{e.log_evidence:.3f} ± {e.log_evidence_error:.3f}"),
        ("ESS", f"{e.ess:.0f} ({e.ess / e.weight.size:.0%})"),
        ("k-hat", f"{e.khat:.2f} (limit {e.khat_limit:.2f})"),
    ]
    if v.drift:
        moved = f"drift p = {v.drift.pvalue:.2g}, acceptance {v.drift.acceptance:.2f}, step {v.drift.step_size:.2g} sds"
        facts.append(("HMC", moved))
    for i, run in enumerate(v.restarts):
        r = run.evidence
        apart = f"ELBO {r.elbo:.3f}, log evidence {r.log_evidence:.3f}, means up to {np.abs(run.mean_shift).max():.2f} sds apart"
        facts.append((f"restart {i}", apart))

    worst = np.argsort(-v.mean_error, kind="stable")[:_ROWS]
    head = ["", "mean", "sd", "reweighted", "sd", "shift/sd", "z", "HMC mean", "error <"]
    rows = [head]
    for j in worst:
        hmc = f"{v.drift.mean[j]:.3g}" if v.drift and j < v.drift.mean.size else "-"
        numbers = (t.mean[j], t.sd[j], t.mean_reweighted[j], t.sd_reweighted[j])
        rows.append(
            [
                v.names[j],
                *(f"{x:.3g}" for x in numbers),
                f"{t.mean_shift[j]:+.2f}",
                f"{t.mean_z[j]:+.1f}",
                hmc,
                f"{v.mean_error[j]:.2f}",
            ]
        )
    lines = [
        v.verdict,
        *(f"  - {reason}" for reason in v.reasons),
        f"next: {v.advice}",
        "",
        *_align(facts, left=2),
        "",
        *_align(rows),
    ]
    if len(v.names) > _ROWS:
        lines.append(f"and {len(v.names) - _ROWS} coordinates in less doubt")
    return "\n".join(lines)


def _align(rows: list, left: int = 1) -> list[str]:
    """Columns padded to one width, the first `left` of them on the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]

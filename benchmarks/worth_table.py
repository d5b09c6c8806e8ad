"""Rows of `worth.py` as a table in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

#: Columns of efficiencies: title, policy, way to know norms, saving.
COLUMNS = (
    ("InfoBatch as published", "infobatch, r = 0.5", "loss", None),
    ("by loss", "variance", "loss", 0.5),
    ("by loss, calibrated", "variance", "calibrated", 0.5),
    ("by whole gradient", "variance", "norm", 0.5),
    ("by last layer's gradient", "variance", "gradient", 0.5),
)
#: The column of lengths, in the same way.
LENGTH = ("half of the visits by it, as good as a length of", "variance", "gradient", 0.5)


def markdown(rows: Sequence[dict]) -> str:
    """A line for each task and moment: limit, noise scale, and efficiencies."""
    titles = ["task", "done", "limit", "noise scale / batch", "a visit's worth at most", "variance between samples"]
    lines = ["| " + " | ".join([*titles, *(each[0] for each in COLUMNS), LENGTH[0]]) + " |"]
    lines.append("|" + "---|" * (len(titles) + len(COLUMNS) + 1))
    for row in rows:
        noise = row["noise_over_batch"]
        cells = [
            row["task"],
            f"{row['moment']:.3g}",
            _shown(row["limit"]),
            "not seen" if noise is None else f"{noise:.1f}",
        ]
        cells += [_shown(row["most"]), f"{row['variance_between_samples']:.0%}"]
        cells += [_found(row["rows"], "efficiency", *each[1:]) for each in COLUMNS]
        cells.append(_found(row["rows"], "equal_length", *LENGTH[1:]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _found(rows: Sequence[dict], figure: str, policy: str, way: str, saving: float | None) -> str:
    wanted = dict(policy=policy, way=way, saving=saving)
    found = [row for row in rows if {name: row[name] for name in wanted} == wanted]
    if not found:
        return "-"
    # So many intervals would be read by nobody; the file has all of them.
    return _shown(found[0][figure]) if way == "gradient" else f"{found[0][figure][0]:.2f}"


def _shown(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    return f"{value:.2f} ({low:.2f} to {high:.2f})"

"""What samples are ranked by: the settings of a score."""

from __future__ import annotations

from .checks import is_number, what_is_wrong

#: What a sample is ranked by; see :class:`.ScoreStore`.
SCORES = ("raw", "ema", "timestep")
#: Decay of the average where nothing else is said: about ten visits, as a diffusion loss needs.
DEFAULT_EMA = 0.9


def resolve_score(score: str | None = None, score_ema: float | None = None) -> tuple[str, float]:
    """What samples are ranked by, and the decay of its average.

    Args:
        score (str, optional): ``'raw'``, ``'ema'`` or ``'timestep'``. Defaults to None: as the decay says.
        score_ema (float, optional): In [0, 1). Defaults to None: as the score says.

    Returns:
        tuple[str, float]: Both, as :class:`ScoreStore` describes them.

    Raises:
        ValueError: If one is out of its range, or they contradict each other.
    """
    if score_ema is not None:
        check_score_ema(score_ema)
    if score is None:
        score = "ema" if score_ema else "raw"
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose one of {SCORES}")
    if score_ema is None:
        score_ema = 0.0 if score == "raw" else DEFAULT_EMA
    if (score == "raw" and score_ema) or (score == "ema" and not score_ema):
        raise ValueError(
            f"score={score!r} and score_ema={score_ema!r} contradict each other: 'raw' is the last loss (0), 'ema' an "
            "average over visits (above 0)"
        )
    return score, float(score_ema)


def check_score_ema(score_ema: float) -> None:
    """Refuse a decay that is outside [0, 1)."""
    if not is_number(score_ema) or not 0 <= score_ema < 1:
        raise ValueError(
            f"score_ema={score_ema!r} {what_is_wrong(score_ema, '[0, 1)')}: it is the decay of the average over a "
            "sample's visits; use 0 for its last loss, 0.5 or 0.8 for an average over about two or five"
        )

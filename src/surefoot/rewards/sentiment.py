"""The demo's reward: VADER's compound sentiment (Hutto & Gilbert, ICWSM 2014) of the continuation alone."""

import functools
from typing import Any

from surefoot.errors import InputError


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        needed = "the sentiment reward needs the package vaderSentiment"
        raise InputError(f"{needed}; run: pip install 'surefoot[demo]'") from None
    return SentimentIntensityAnalyzer()


def vader_compound(*, completions: list[str], **_: object) -> list[float]:
    """Compound score in [-1, 1] of each completion."""
    return [float(_analyzer().polarity_scores(text)["compound"]) for text in completions]

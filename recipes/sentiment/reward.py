"""A reward function: VADER's sentiment, less for a completion that repeats words."""

from surefoot.rewards.sentiment import vader_compound


def reward(prompts, completions, **columns):
    scores = vader_compound(completions=completions)
    return [score * variety(text) for score, text in zip(scores, completions, strict=True)]


def variety(text):
    """Distinct words over words: 1 without repetition."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 0.0

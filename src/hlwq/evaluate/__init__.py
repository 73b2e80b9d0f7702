"""Measurements of a model, each by a named protocol and with its uncertainty."""

from hlwq.evaluate.perplexity import Perplexity, paired_difference, perplexity

__all__ = ["Perplexity", "paired_difference", "perplexity"]

"""Renders a manifest of prompts with LTX-2.3 on a Ray cluster into a dataset of clips with sound."""

__version__ = "0.1.0"

"""Rendering of prompts of the miniature's world, and scores of the clips (scripts/quality.py)."""

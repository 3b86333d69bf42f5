"""Parquet and JSONL manifests: their columns, reading them, and judging their rows."""

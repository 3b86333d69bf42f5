"""Parquet and JSONL manifests: reading rows, judging them."""

"""Weights over ranks: tensor-parallel layers, loading of shards, LoRA merging and fp8 storage."""

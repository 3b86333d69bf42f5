"""What fits where on a cluster, decided once per run."""

"""What fits where on a cluster, decided once a run."""

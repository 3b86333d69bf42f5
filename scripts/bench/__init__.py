"""What the benchmark programs in scripts/ share; none of these is run by itself but model_files.py."""

"""Modules that the benchmark programs in scripts/ share. Only random_model.py is also a program."""

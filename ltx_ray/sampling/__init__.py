"""Noise, schedules, samplers and guidance. The package itself imports no torch, because the driver reads `passes`."""

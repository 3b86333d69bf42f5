"""The work of one rank: text, diffusion and decoding. Nothing here imports Ray."""

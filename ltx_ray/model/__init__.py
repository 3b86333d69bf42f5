"""The LTX-2.3 audio-video transformer: a plain forward pass, and a fused one on the same weights."""

"""Weight files read by their headers: names, shapes, configurations, digests, LoRA formats. No torch."""

"""Weight files seen from outside: headers, names, digests, LoRA spellings. No torch here."""

"""From rows to work: what is new, done, repeated or illegal, and what it costs."""

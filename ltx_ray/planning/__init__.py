"""Planning: which rows are new, done, repeated or illegal, the items they ask for, and what these cost."""

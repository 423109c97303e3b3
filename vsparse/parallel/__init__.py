"""One video over several processes: who holds which heads and tokens, and what they send to each other."""

"""One video over several processes: who holds which heads and tokens, and what they send to each other."""

from vsparse.parallel.context import ContextParallel

__all__ = ["ContextParallel"]

"""`Pruner.step` inside other people's training loops, one a file; each needs its own package and no other."""

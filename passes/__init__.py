"""Program to program: what becomes of the weights."""

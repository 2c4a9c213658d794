"""How long a search may take."""

# Seconds that a distinct problem may take, by effort. The best guess is timed in any case; after it only what, taking
# as long as the slowest so far, would end in time.
BUDGET = {"off": 0.0, "quick": 2.0, "thorough": 30.0}

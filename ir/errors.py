"""The errors that a user sees. Each message is one paragraph: what, where, expected against got, what to do next."""


class SparsecError(Exception):
    """sparsec cannot go on with this input; nothing was written. The CLI prints the message and exits with 1."""

    exit_code = 1


class UsageError(SparsecError, ValueError):
    """An option or argument that cannot be: an impossible pattern, a sparsity outside 0..1. The CLI exits with 2."""

    exit_code = 2

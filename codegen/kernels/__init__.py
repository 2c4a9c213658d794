"""Sparse kernels as TVM functions: one kind of machine a folder, one schedule family a file."""

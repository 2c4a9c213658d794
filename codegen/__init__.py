"""From a problem (shapes, pattern, density, epilogue) to machine code, and to the operator library that holds it."""

"""From a problem and a schedule to machine code, one kind of machine a file."""

"""One driver that runs a program, for every backend that supplies the three kinds of products."""

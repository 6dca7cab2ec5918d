"""One driver that walks a program, for every backend that supplies the three kinds of products."""

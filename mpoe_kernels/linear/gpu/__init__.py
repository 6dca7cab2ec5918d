"""Shared by the GPU backends: contractions of operands with named axes, one launch for each product of a program."""

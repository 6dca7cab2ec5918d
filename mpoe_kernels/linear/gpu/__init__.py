"""What the GPU backends share: contractions of operands with named axes, one launch for each product of a program."""

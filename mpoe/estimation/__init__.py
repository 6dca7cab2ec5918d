"""What a converted model would cost, from its configuration alone: parameters, FLOPs, memory; shapes for a budget."""

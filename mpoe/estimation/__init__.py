"""What a converted model would cost, from its configuration alone: parameters, memory, operations, time, shapes."""

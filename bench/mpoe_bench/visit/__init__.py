"""`bench/gpu.sh`: one visit to a GPU, from the build to the comparison with peers."""

"""What `vbon bench` measures, and benchmarks that run on their own."""

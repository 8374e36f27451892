"""Tasks on real data that every machine has or can install: examples to copy and jobs to measure with."""

"""What measures kdbench itself: pairwise, in one run, as ratios. `python -m benchmarks --help`; docs/benchmarks.md says what."""

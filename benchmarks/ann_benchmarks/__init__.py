"""What ann-benchmarks copies into its folder of algorithms."""

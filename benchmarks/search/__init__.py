"""The comparison of vector search with its peers; ``python benchmarks/bench_search.py`` prints it."""

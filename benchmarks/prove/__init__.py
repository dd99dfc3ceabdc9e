"""Full campaigns behind claims: `make prove AREA=name` runs one and writes benchmarks/results/name.json."""

"""Full campaigns behind the project's claims: `make prove AREA=name` runs one and writes benchmarks/results/name.json."""

"""The tests. They mirror the packages: what is in `parallel/` is tested in `tests/parallel/`."""

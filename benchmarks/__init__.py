"""Benchmarks of pyroflows beside its peers; never imported by the package."""

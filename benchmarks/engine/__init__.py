"""The llama.cpp engine beside its references: `python -m benchmarks.engine`, see `__main__.py`. One file a measurement."""

"""Side-by-side measurements: each prints its figures beside a reference's of the same run. `python -m benchmarks.NAME`."""

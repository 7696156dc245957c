"""Engines. `base.py` says what one is; `modules.loaders` lists them."""

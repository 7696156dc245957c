"""Text Generation Web UI. Importing this package does nothing; `docs/architecture.md` lists the modules in order."""

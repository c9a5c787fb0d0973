"""Writing a model: planned to the byte, filled in parallel, continued after a kill, recorded."""

"""Model files as they lie on disk or on the hub, each format read lazily and believed only after it was checked."""

"""The arithmetic of a merge: chunks, surveys, devices, worker processes."""

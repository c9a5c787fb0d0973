"""Floor 2: the catalogue of merge methods, one function per file. Listing them imports no torch."""

from modelglue.methods.registry import Method, Parameter, PerModel, Range, all_methods, get, method, per_model

__all__ = ["Method", "Parameter", "PerModel", "Range", "all_methods", "get", "method", "per_model"]

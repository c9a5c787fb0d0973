"""What a merge method of yours can be tested with; see `modelglue.testing.conformance`."""

from modelglue.testing.conformance import CHECKS, parameter_sets

__all__ = ["CHECKS", "parameter_sets"]

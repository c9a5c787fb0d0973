"""Floor 5: who is in the zoo, how close its models are, and which of them may be merged with each other."""

from modelglue.zoo.difference import Difference, Sums, TensorDifference, diff
from modelglue.zoo.families import Families, Family, Pair, find_families
from modelglue.zoo.schema import Prompts, Zoo, ZooFile, ZooModel, read_zoo
from modelglue.zoo.signature import Signature, config_warnings, groups, signature
from modelglue.zoo.similarity import Similarity, similarity

__all__ = [
    "Difference",
    "Families",
    "Family",
    "Pair",
    "Prompts",
    "Signature",
    "Similarity",
    "Sums",
    "TensorDifference",
    "Zoo",
    "ZooFile",
    "ZooModel",
    "config_warnings",
    "diff",
    "find_families",
    "groups",
    "read_zoo",
    "signature",
    "similarity",
]

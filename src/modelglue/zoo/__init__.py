"""Floor 5: who is in the zoo, how close its models are, and which of them may be merged with each other."""

from modelglue.zoo.families import Families, Family, Pair, find_families
from modelglue.zoo.schema import Prompts, Zoo, ZooFile, ZooModel, read_zoo
from modelglue.zoo.signature import Signature, config_warnings, groups, signature
from modelglue.zoo.similarity import Similarity, similarity

__all__ = [
    "Families",
    "Family",
    "Pair",
    "Prompts",
    "Signature",
    "Similarity",
    "Zoo",
    "ZooFile",
    "ZooModel",
    "config_warnings",
    "find_families",
    "groups",
    "read_zoo",
    "signature",
    "similarity",
]

"""Floor 6: further training of a model, or of a part of it, on texts."""

from modelglue.training.settings import Training
from modelglue.training.train import TrainReport, train

__all__ = ["TrainReport", "Training", "train"]

"""The model class of mixtures below model level: read from here by modelglue, and copied into the folders that it writes."""

from modelglue.models.mixture_code.classes import MODEL_TYPE, backbone_type, mixture_class, parsed_config, source_files

__all__ = ["MODEL_TYPE", "backbone_type", "mixture_class", "parsed_config", "source_files"]

"""Adapters in PEFT's LoRA format, read without any model: their config, their tensors, their factors."""

from modelglue.checkpoint.adapter.config import CONFIG_FILE, AdapterConfig, read_config
from modelglue.checkpoint.adapter.folder import WEIGHTS_FILE, Adapter, Factors, Update, open_adapter

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "Adapter", "AdapterConfig", "Factors", "Update", "open_adapter", "read_config"]

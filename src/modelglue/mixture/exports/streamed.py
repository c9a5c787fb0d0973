"""A reader of all layers of a large model in the memory of one: layers are in float32 only while they run."""

from __future__ import annotations

from typing import Any

from modelglue.checkpoint import Checkpoint
from modelglue.mixture.encoder import slim_reader
from modelglue.mixture.router import Reader
from modelglue.models import decoder_layers, load_tokenizer
from modelglue.models.mapped import load_mapped


def streamed_reader(checkpoint: Checkpoint) -> Reader:
    """The `Reader` of a decoder built like Llama, in float32 as gates are made, bit for bit that of the whole model in float32.

    Memory: weights stay in their files; one layer in float32 at a time, and the rows of the embedding that texts use.
    """
    model = load_mapped(checkpoint)
    for layer in decoder_layers(model)[1]:
        stored = [(parameter, parameter.data) for parameter in layer.parameters()]
        layer.register_forward_pre_hook(_widen)
        layer.register_forward_hook(lambda _module, _arguments, _output, stored=stored: _restore(stored))
    model.get_input_embeddings().register_forward_hook(lambda _module, _arguments, output: output.float())
    return Reader(model, load_tokenizer(checkpoint), 0)


def embedding_reader(checkpoint: Checkpoint) -> Reader:
    """The same where token embeddings are all that is read."""
    return slim_reader(checkpoint, 0)


def _widen(module: Any, _arguments: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.float()


def _restore(stored: list[tuple[Any, Any]]) -> None:
    for parameter, data in stored:
        parameter.data = data

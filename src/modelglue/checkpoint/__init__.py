"""Floor 1: everything with named weights is a `Checkpoint`; here they are opened, composed and written."""

from modelglue.checkpoint.engine.merge_function import Constant, MergeFunction, ParameterSource, Round
from modelglue.checkpoint.formats.folder import DiskCheckpoint, SafetensorsCheckpoint
from modelglue.checkpoint.formats.pickled import PickledCheckpoint
from modelglue.checkpoint.formats.quantised import quantisation_of
from modelglue.checkpoint.merged import ENGINE_VERSION, MergedCheckpoint
from modelglue.checkpoint.output.plan import Plan, plan_output, tensor_file, write_tensor_file
from modelglue.checkpoint.output.record import RECORD_FILE, RECORD_FORMAT
from modelglue.checkpoint.output.staging import json_bytes, staged, write_bytes_atomic, write_json_atomic
from modelglue.checkpoint.output.writer import RECIPE_FILE, SaveReport, save
from modelglue.checkpoint.output.yaml_text import SHORT_FLOAT, yaml_text
from modelglue.checkpoint.protocol import FLOATING, ITEM_SIZE, Checkpoint, SideFile, TensorInfo, file_bytes, file_place
from modelglue.checkpoint.reference import open_checkpoint
from modelglue.checkpoint.tensors import STORE_DTYPES, TensorsCheckpoint, dtype_name, torch_dtype
from modelglue.checkpoint.views import JoinedCheckpoint, RenamedCheckpoint

__all__ = [
    "ENGINE_VERSION",
    "FLOATING",
    "ITEM_SIZE",
    "RECIPE_FILE",
    "RECORD_FILE",
    "RECORD_FORMAT",
    "SHORT_FLOAT",
    "STORE_DTYPES",
    "Checkpoint",
    "Constant",
    "DiskCheckpoint",
    "JoinedCheckpoint",
    "MergeFunction",
    "MergedCheckpoint",
    "ParameterSource",
    "PickledCheckpoint",
    "Plan",
    "RenamedCheckpoint",
    "Round",
    "SafetensorsCheckpoint",
    "SaveReport",
    "SideFile",
    "TensorInfo",
    "TensorsCheckpoint",
    "dtype_name",
    "file_bytes",
    "file_place",
    "json_bytes",
    "open_checkpoint",
    "plan_output",
    "quantisation_of",
    "save",
    "staged",
    "tensor_file",
    "torch_dtype",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_tensor_file",
    "yaml_text",
]

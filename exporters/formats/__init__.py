"""The formats of `ssmc export`, one file each."""

from ssmc.exporters.formats.compressed_tensors import COMPRESSED_TENSORS
from ssmc.exporters.formats.gguf import GGUF
from ssmc.exporters.formats.mamba_ssm import MAMBA_SSM
from ssmc.exporters.formats.onnx import ONNX
from ssmc.exporters.formats.safetensors import SAFETENSORS
from ssmc.exporters.formats.sparse24 import SPARSE24

FORMATS = {format.name: format for format in (SAFETENSORS, MAMBA_SSM, SPARSE24, ONNX, GGUF, COMPRESSED_TENSORS)}

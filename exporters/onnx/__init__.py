"""`--format onnx`: a graph with explicit states, built from the tensors, that onnxruntime runs."""

from ssmc.exporters.onnx import mamba
from ssmc.exporters.onnx.export import OnnxOptions, OnnxReport, export_onnx, runs_where
from ssmc.exporters.onnx.graph import Settings, build

__all__ = ["OnnxOptions", "OnnxReport", "Settings", "build", "export_onnx", "mamba", "runs_where"]

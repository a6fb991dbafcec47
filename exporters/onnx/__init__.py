"""A graph with explicit states, built from the tensors of a model, that onnxruntime runs."""

from ssmc.exporters.onnx.graph import Settings, build

__all__ = ["Settings", "build"]

"""One layer of each family in an ONNX graph."""

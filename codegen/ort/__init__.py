"""The custom-op library that runs the kernels inside ONNX Runtime."""

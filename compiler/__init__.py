"""The roof: driver and configuration, ONNX in and out, decisions, artifacts, reports, the command line."""

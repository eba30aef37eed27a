"""Engines: the steps of a detector as compiled graphs, by OpenVINO, ONNX Runtime or `torch.compile`."""

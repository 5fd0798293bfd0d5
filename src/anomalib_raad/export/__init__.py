"""From a finished model to an OpenVINO IR whose convolutions run in integer kernels."""

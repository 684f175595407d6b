"""A checkpoint's files, laid out without copying a tensor: torch's and safetensors' formats."""

import local_package  # noqa: F401  makes `depthvlm` importable

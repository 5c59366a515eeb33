"""DepthVLM-Bench: public depth data sets in one schema. Command line: `python -m bench --help`."""

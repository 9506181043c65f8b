"""The stages, one file each; `pipeline.py` runs them all in order."""

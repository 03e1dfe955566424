"""Data sets on disk, read into the records of `med3dvlm.records`."""

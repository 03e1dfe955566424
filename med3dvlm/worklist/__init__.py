"""A model at work on many scans without anybody watching: a folder, a list or a table goes in, tables come out."""

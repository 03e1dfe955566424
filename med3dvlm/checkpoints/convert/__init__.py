"""Checkpoints as their authors released them, read into this package's layout: `names` (the tables), `weights` (the files), `architecture`
(which model of ours it is) and `conversion` (all of it together, `convert_published`)."""

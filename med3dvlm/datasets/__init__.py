"""Data sets on disk, read into the records of `med3dvlm.records`.

Each module of `DATASETS` has `splits(root) -> list[str]`, the names of the splits that lie there, and
`read(root, split, failures=None) -> (studies, questions)`, where `failures` takes {"study", "file", "reason"} of each study that is left out.
"""

from types import ModuleType

from med3dvlm.datasets import ct_rate, m3d, m3d_seg, rex_grounding_ct, table, totalsegmentator

DATASETS: dict[str, ModuleType] = {
    "m3d": m3d,
    "ct_rate": ct_rate,
    "m3d_seg": m3d_seg,
    "totalsegmentator": totalsegmentator,
    "rex_grounding_ct": rex_grounding_ct,
    "table": table,
}

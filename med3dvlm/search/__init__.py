"""Search among cases: which scans look to a Med3DCLIP like a scan, or like what a text says."""

from med3dvlm.search.cases import CaseIndex, Hit
from med3dvlm.search.embedding import Embedder

__all__ = ["CaseIndex", "Embedder", "Hit"]

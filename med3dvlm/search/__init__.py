"""Search for similar cases by a Med3DCLIP: by a scan, or by a text."""

from med3dvlm.search.cases import CaseIndex, Hit
from med3dvlm.search.embedding import Embedder

__all__ = ["CaseIndex", "Embedder", "Hit"]

"""Imports of the server of tests/launching.py before it forks, which each process would otherwise repeat.

The garbage collector then ignores these objects, so that forks do not copy their memory.
"""

import gc
import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from med3dvlm.cli import PROGRAMS
from med3dvlm.models import portable

for name in (
    "pytest", "deepspeed", "peft", "open_clip.loss", "transformers.trainer", "transformers.models.distilbert.modeling_distilbert",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.bert.modeling_bert", "sklearn.metrics", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "scipy.stats", "med3dvlm.inference.chat", "med3dvlm.datasets.phantom", "med3dvlm.datasets.preparation",
    "packaging.requirements",
    *(f"med3dvlm.{module}" for commands in PROGRAMS.values() for module, _ in commands.values() if not module.startswith("app")),
):  # fmt: skip
    importlib.import_module(name)
portable.code()
get_checkpoint_conversion_mapping("qwen2")
gc.collect()
gc.freeze()

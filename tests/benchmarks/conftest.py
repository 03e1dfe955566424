"""The tiny models and prepared data of the evaluation's tests."""

from tests.eval.conftest import chests, demo, run  # noqa: F401

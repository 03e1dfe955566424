"""The tiny models and prepared data of the evaluation's tests."""

from tests.evaluation.conftest import chests, demo, run  # noqa: F401

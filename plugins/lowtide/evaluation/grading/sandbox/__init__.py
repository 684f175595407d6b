"""Unit tests of code that a model wrote, in processes that can compute and nothing else."""

from lowtide.evaluation.grading.sandbox.running import (
    Limits,
    TestResult,
    code_in,
    run_tests,
)

__all__ = ["Limits", "TestResult", "code_in", "run_tests"]

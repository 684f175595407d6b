"""Error bars, paired tests, corrections and agreement, with numpy alone."""

from lowtide.evaluation.statistics.agreement import krippendorff_alpha, weighted_kappa
from lowtide.evaluation.statistics.clusters import f1_of_means, mean, ratio
from lowtide.evaluation.statistics.errors_of_means import (
    holm,
    items_needed,
    minimal_detectable_effect,
    normal_interval,
    standard_error,
    wilson,
)
from lowtide.evaluation.statistics.paired import (
    McNemar,
    mcnemar,
    paired_bootstrap,
    sign_flip_test,
)
from lowtide.evaluation.statistics.resampling import Interval, bootstrap

__all__ = [
    "Interval",
    "McNemar",
    "bootstrap",
    "f1_of_means",
    "holm",
    "items_needed",
    "krippendorff_alpha",
    "mcnemar",
    "mean",
    "minimal_detectable_effect",
    "normal_interval",
    "paired_bootstrap",
    "ratio",
    "sign_flip_test",
    "standard_error",
    "weighted_kappa",
    "wilson",
]

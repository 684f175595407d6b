"""scikit-learn's base classes where it is installed, and the little of them that is needed else."""

from __future__ import annotations

import inspect
from typing import Any

from lowtide.core.errors import ConfigError, DataError, LowtideError, listed, near

try:
    from sklearn.base import (
        BaseEstimator,
        ClassNamePrefixFeaturesOutMixin,
        ClusterMixin,
        TransformerMixin,
    )
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.exceptions import NotFittedError as _NotFittedError
    from sklearn.utils.validation import validate_data  # scikit-learn 1.6
except ImportError:
    HAS_SKLEARN = False

    class ConvergenceWarning(UserWarning):  # type: ignore[no-redef]
        """A fit ended with less than it was asked for."""

    class _NotFittedError(ValueError, AttributeError):  # type: ignore[no-redef]
        pass

else:
    HAS_SKLEARN = True

__all__ = ["HAS_SKLEARN", "ConvergenceWarning", "Estimator", "NotFittedError"]


class NotFittedError(LowtideError, _NotFittedError):
    """An estimator is asked for something that it only knows after `fit`."""


class _Parameters:
    """`get_params` and `set_params` over the arguments of ``__init__``."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:  # noqa: ARG002
        """Return the parameters by name."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names}

    def set_params(self, **parameters: Any) -> Any:
        """Set parameters by name.

        Raises:
            ConfigError: no such parameter.
        """
        known = self.get_params()
        for name, value in parameters.items():
            if name not in known:
                raise ConfigError(
                    f'{type(self).__name__}: no parameter "{name}".{near(name, known)} '
                    f"Known: {listed(known)}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        signature = inspect.signature(type(self)).parameters
        given = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value is not signature[name].default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


if HAS_SKLEARN:

    class Estimator(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
        """A clusterer and transformer of scikit-learn."""

        def __sklearn_tags__(self) -> Any:
            tags = super().__sklearn_tags__()
            tags.transformer_tags.preserves_dtype = ["float64", "float32"]
            return tags

        def look_at(self, given: Any, features: int, *, is_first: bool) -> None:  # noqa: ARG002
            """Learn the number and names of features, or compare them with those learned."""
            validate_data(self, given, reset=is_first, skip_check_array=True)

else:

    class Estimator(_Parameters):  # type: ignore[no-redef]
        """Enough of an estimator for code that asks for no base class."""

        def look_at(self, given: Any, features: int, *, is_first: bool) -> None:  # noqa: ARG002
            """Learn the number of features, or compare it with the one learned."""
            if is_first:
                self.n_features_in_ = features
            elif features != self.n_features_in_:
                raise DataError(
                    f"X has {features} features, but {type(self).__name__} is expecting "
                    f"{self.n_features_in_} features as input."
                )

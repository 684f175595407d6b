"""ZeRO-3: parameters that are there only while a module needs them.

Stock autograd saves the parameter object itself, so that DeepSpeed takes its memory away after the
forward of a module, and the backward finds it gathered again. A pack hook is given the gathered
memory instead: held, all of the model would stay gathered. So what is held is the parameter, and
which part of it. (DeepSpeed 0.19.8, ``runtime/zero/partition_parameters.py`` and ``linear.py``.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import Parameter


def partitioned(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Return the parameters that DeepSpeed has divided over the ranks."""
    return [each for each in parameters if hasattr(each, "ds_status")]


def find(tensor: Tensor, parameters: Iterable[Parameter]) -> Callable[[], Tensor] | None:
    """Return what gives `tensor` again later, if it lies in a gathered parameter's memory.

    Args:
        tensor: A tensor that is being saved.
        parameters: Those of `partitioned`.
    """
    storage, offset = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    for parameter in parameters:
        if not _is_gathered(parameter) or parameter.untyped_storage()._cdata != storage:
            continue
        begin = parameter.storage_offset()
        if begin <= offset < begin + parameter.numel():
            strides = tuple(int(each) for each in tensor.stride())
            return _Part(parameter, tuple(tensor.shape), strides, offset - int(begin))
    return None


class _Part:
    """A view of a parameter, wherever its memory is at that time."""

    __slots__ = ("_offset", "_parameter", "_shape", "_strides")

    def __init__(
        self, parameter: Any, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> None:
        self._parameter = parameter
        self._shape = shape
        self._strides = strides
        self._offset = offset

    def __call__(self) -> Tensor:
        parameter = self._parameter
        if _is_gathered(parameter):
            return self._view()
        # As DeepSpeed's own linear function does it; the view keeps the gathered memory alive.
        parameter.all_gather()
        try:
            return self._view()
        finally:
            parameter.partition()

    def _view(self) -> Tensor:
        whole: Tensor = self._parameter.data
        return whole.as_strided(self._shape, self._strides, whole.storage_offset() + self._offset)


def _is_gathered(parameter: Any) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")

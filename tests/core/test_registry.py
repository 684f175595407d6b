"""Names resolve lazily, collide loudly and explain themselves."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from lowtide.core.errors import LowtideError, UnknownNameError
from lowtide.core.registry import Registry


class Base:
    """A base class for targets."""


class Good(Base):
    """A suitable target."""


def test_target_is_imported_only_when_asked_for() -> None:
    registry: Registry[object] = Registry("thing", "lowtide.test.none")
    sys.modules.pop("colorsys", None)
    registry.register("lazy", "colorsys:namedtuple")
    assert registry.names() == ["lazy"]
    assert "colorsys" not in sys.modules
    registry.register("gone", "lowtide.nothing:Here")
    with pytest.raises(LowtideError, match=r'thing "gone".*cannot be imported'):
        registry.get("gone")


def test_unknown_name_lists_nearest_and_known() -> None:
    registry: Registry[object] = Registry("codec", "lowtide.test.none")
    registry.register("lowtide.sz", Good)
    with pytest.raises(UnknownNameError) as caught:
        registry.get("lowtide.zs")
    assert str(caught.value) == (
        'unknown codec "lowtide.zs". Did you mean "lowtide.sz"? Known: "lowtide.sz"'
    )
    assert isinstance(caught.value, KeyError)


def test_second_target_under_a_taken_name_is_refused() -> None:
    registry: Registry[object] = Registry("codec", "lowtide.test.none")
    registry.register("x", Good)
    registry.register("x", Good)
    with pytest.raises(
        LowtideError, match=r"already registered as .*Good by lowtide.*other-package"
    ):
        registry.register("x", "elsewhere:Codec", origin="other-package")
    assert registry.get("x") is Good


def test_wrong_kind_of_target_is_refused() -> None:
    registry: Registry[object] = Registry("codec", "lowtide.test.none", base=Base)
    registry.register("x", "collections:OrderedDict")
    with pytest.raises(LowtideError, match=r"not a subclass of .*Base"):
        registry.get("x")


def test_entry_points_add_names(monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("mine", f"{__name__}:Good", "lowtide.test.group")
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [point] if group == "lowtide.test.group" else []
    )
    registry: Registry[object] = Registry("codec", "lowtide.test.group")
    assert registry.names() == ["mine"]
    assert registry.get("mine").__name__ == "Good"

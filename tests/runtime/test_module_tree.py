"""Whether a model's modules and parameters are still the same ones, as seen by the native library and without it."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from mc_kernels import extension
from mc_runtime.huge_pages import HugePages
from mc_runtime.model import module_tree
from mc_runtime.model.layers import Like, RMSNorm
from mc_runtime.model.module_tree import HOOKED, OTHER, SAME, ModuleTree, PlainTables


@pytest.fixture(params=["native", "plain"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], ModuleTree]:
    missing = extension.available()
    if request.param == "native" and missing:
        pytest.skip(missing)
    if request.param == "plain":
        monkeypatch.setattr(module_tree.extension, "available", lambda: "not here")

    def tree(root: nn.Module) -> ModuleTree:
        made = ModuleTree(root)
        assert isinstance(made._tables, PlainTables) == (request.param == "plain")
        return made

    return tree


def rename(module: nn.Module) -> None:
    module._parameters["gain"] = module._parameters.pop("weight")


def reclass(module: nn.Module) -> None:
    module.__class__ = type("Other", (type(module),), {})


CHANGES: dict[str, Callable[[Any], object]] = {
    "a parameter is set": lambda layers: setattr(layers[1].ffn.down, "weight", nn.Parameter(torch.zeros(2, 2))),
    "in the table": lambda layers: layers[1].ffn.down._parameters.update(weight=layers[0].ffn.down.weight),
    "a bias is added": lambda layers: layers[0].attention.out.register_parameter("b", nn.Parameter(torch.zeros(2))),
    "a parameter is gone": lambda layers: layers[-1].attention_norm.__delattr__("weight"),
    "a parameter has another name": lambda layers: rename(layers[0].ffn_norm),
    "a module is replaced": lambda layers: setattr(layers[0].ffn, "down", nn.Identity()),
    "a module is added": lambda layers: layers[0].add_module("more", nn.Identity()),
    "a layer is gone": lambda layers: layers.__delitem__(0),
    "two layers change places": lambda layers: layers._modules.update({"0": layers[1], "1": layers[0]}),
    "another class": lambda layers: reclass(layers[1].ffn),
    "another eps": lambda layers: setattr(layers[-1].ffn_norm, "eps", 0.5),
    "eps is gone": lambda layers: layers[0].ffn_norm.__delattr__("eps"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_is_replaced_is_seen(make: Callable[[nn.Module], ModuleTree], change: Callable[[Any], object]) -> None:
    layers = tiny_model().decoder.layers
    tree = make(layers)
    assert tree.look(layers) == SAME
    change(layers)
    assert tree.look(layers) == OTHER
    assert make(layers).look(layers) == SAME


def test_values_may_change_and_the_root_may_not(make: Callable[[nn.Module], ModuleTree]) -> None:
    layers = tiny_model().decoder.layers
    tree = make(layers)
    with torch.no_grad():
        layers[0].ffn.down.weight.add_(1)
    layers.train()
    layers[0].note = "a thing that is no parameter"
    assert tree.look(layers) == SAME
    assert tree.look(tiny_model().decoder.layers) == OTHER


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks(make: Callable[[nn.Module], ModuleTree], register: str) -> None:
    layers = tiny_model().decoder.layers
    tree = make(layers)
    handle = getattr(layers[1].attention.qkv, register)(lambda *_: None)
    assert tree.look(layers) == HOOKED
    assert make(layers).look(layers) == HOOKED
    layers[0].ffn_norm.eps = 0.25
    assert tree.look(layers) == OTHER
    handle.remove()
    assert make(layers).look(layers) == SAME


def test_tables_that_have_grown(make: Callable[[nn.Module], ModuleTree]) -> None:
    """A dict of many entries, of which some have been removed, lies in memory otherwise than one of few."""
    root = nn.Module()
    for i in range(200):
        root.register_parameter(f"p{i}", nn.Parameter(torch.zeros(1)))
    for i in range(0, 200, 3):
        delattr(root, f"p{i}")
    tree = make(root)
    assert tree.look(root) == SAME
    root.p100 = nn.Parameter(torch.zeros(1))
    assert tree.look(root) == OTHER
    like = Like(torch.float32, None, HugePages())
    root = nn.Sequential(*(RMSNorm(4, 1e-5, like) for _ in range(40)))
    tree = make(root)
    assert tree.look(root) == SAME
    root[39].eps = 1e-6
    assert tree.look(root) == OTHER


def test_a_hook_that_holds_what_holds_the_tree_is_collected(make: Callable[[nn.Module], ModuleTree]) -> None:
    decoder = tiny_model().decoder
    decoder.tree = make(decoder.layers)  # type: ignore[assignment]
    decoder.layers[0].register_forward_hook(functools.partial(lambda *_: None, decoder))
    gone = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("wrong", [([], [1], [], []), ([], [], [], [[]]), ([], [], [(1, "a")], [])])
def test_only_dicts_are_watched(wrong: tuple[list[Any], ...]) -> None:
    if missing := extension.available():
        pytest.skip(missing)
    with pytest.raises(TypeError, match="expected dicts"):
        extension.library().WatchedTables(*wrong)
    with pytest.raises(ValueError, match="items: expected"):
        extension.library().WatchedTables([], [], [({}, "a", 1)], [])

"""The table of losses, and what they are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from helpers import normal


class Sizes(NamedTuple):
    """L layers, B examples of T tokens, of width D, with F hidden units."""

    L: int = 4
    B: int = 4
    T: int = 3
    D: int = 6
    F: int = 8


class Idiom(NamedTuple):
    """A loss, and how the fused step must treat its parameters."""

    make: Callable[[Sizes], tuple[Any, Any, Any]]  # -> (loss_fn, params, batch)
    axes: dict[str, int | tuple[int, ...]]  # prefix of a name -> axis of layers; {} has none
    walked: Callable[[str], bool]  # whether a parameter is updated layer by layer
    options: dict[str, Any]  # of the step


IDIOMS: dict[str, Idiom] = {}
NO_LAYERS: dict[str, Idiom] = {}  # must not be taken for layers


def layer_axes(axes, name):
    """Returns the axes of the layers of a parameter, as a tuple; empty if it is no stack."""
    prefixes = [p for p in axes if name == p or name.startswith(f"{p}/") or not p]
    found = axes[max(prefixes, key=len)] if prefixes else None
    return found if isinstance(found, tuple) else () if found is None else (found,)


def idiom(axes=None, *, walked=None, registry=IDIOMS, **options):
    """Registers a loss.

    Args:
      axes: the layer axis of each parameter, by prefix of its name. By default "layers" has axis 0.
      walked: whether a parameter is walked layer by layer; by default those that have layers.
      registry: where to.
      options: of the step.
    """
    axes = {"layers": 0} if axes is None else axes
    walked = walked or (lambda name: bool(layer_axes(axes, name)))

    def register(make):
        registry[make.__name__] = Idiom(make, axes, walked, options)
        return make

    return register


def stack(s, seed=0):
    scale = (1 + normal(seed + 2, s.L, s.D, scale=0.1)).astype(jnp.float32)
    return {
        "up": normal(seed, s.L, s.D, s.F, scale=s.D**-0.5),
        "down": normal(seed + 1, s.L, s.F, s.D, scale=s.F**-0.5),
        "scale": scale,
    }


def layers_and_out(s):
    return {"layers": stack(s), "out": normal(9, s.D, s.D)}


def pair(s):
    return {k: normal(i, s.B, s.T, s.D, scale=1.0) for i, k in enumerate("xy", 7)}


def block(x, w):
    return x + jnp.tanh(x * w["scale"] @ w["up"]) @ w["down"]


def scan(layers, x, body=block, **kwargs):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, layers, **kwargs)[0]


def error(a, b):
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b))


def mapped(change, *, out=True, **kwargs):
    """Returns the maker of a loss that scans ``change(layers, batch)``."""

    def make(s):
        def loss(p, b):
            y = scan(change(p["layers"], b), b["x"], **kwargs)
            return error(y @ p["out"] if out else y, b["y"])

        return loss, layers_and_out(s), pair(s)

    return make

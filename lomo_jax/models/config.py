"""The shape of a decoder: one set of switches that describes every supported family."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lomo_jax._schema import short
from lomo_jax.errors import UserError

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
NORM_PLACES = ("before", "after", "around")  # where a layer normalises: its blocks' inputs, outputs
QK_NORMS = ("none", "head", "all", "rotated")
ROPE_SCALINGS = ("linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model are changed to extend its context.

    "linear" divides all frequencies by `factor`. "dynamic" raises the rotary base for rows longer
    than the model's `max_length`. "llama3" and "yarn" divide the low frequencies and leave the
    high ones. "longrope" divides each frequency by its own number.

    References:
      Llama Team, The Llama 3 Herd of Models, arXiv 2407.21783.
      Peng et al., YaRN, arXiv 2309.00071.
      Ding et al., LongRoPE, arXiv 2402.13753.
    """

    kind: str  # one of ROPE_SCALINGS
    factor: float = 1.0  # low frequencies are divided by it
    original_max_length: int = 2048  # tokens; the context length of pre-training
    low_freq_factor: float = 1.0  # "llama3": low is below this many turns in original_max_length
    high_freq_factor: float = 4.0  # and high above this many; interpolated in between
    fast_turns: float = 32.0  # "yarn": high is above this many turns in original_max_length
    slow_turns: float = 1.0  # and low below this many; interpolated in between
    truncate: bool = True  # "yarn": round the ends of the interpolation to whole frequencies
    magnitude: float = 1.0  # multiplies rotated queries and keys; 1 for "linear" and "llama3"
    short_factors: tuple[float, ...] = ()  # "longrope": rows of at most original_max_length
    long_factors: tuple[float, ...] = ()  # "longrope": longer rows

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise UserError(
                f"rope scaling {short(self.kind)} is not supported; supported: 'default', "
                f"{', '.join(map(repr, ROPE_SCALINGS))}"
            )
        for field in dataclasses.fields(self):
            if field.type in ("int", "float"):
                _require_positive(self, field.name, int if field.type == "int" else float)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("slow_turns", "fast_turns")):
            if getattr(self, high) <= getattr(self, low):
                raise UserError(
                    f"rope scaling: {high}={getattr(self, high)} must be greater than "
                    f"{low}={getattr(self, low)}"
                )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder; the defaults describe LLaMA-7B.

    Raises:
      UserError: A size is not a positive integer, `num_heads` is not a multiple of `num_kv_heads`,
        `head_dim` is odd, or a switch has an unknown value.
    """

    vocab_size: int = 32000  # V
    width: int = 4096  # D, of the residual stream
    mlp_width: int = 11008  # F
    num_layers: int = 32  # L
    num_heads: int = 32  # H, of the queries
    num_kv_heads: int = 32  # K, each shared by H / K query heads
    head_dim: int = 128  # h; D / H in most models, but independent of both
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # added to the mean square in a norm
    max_length: int = 2048  # tokens; the longest sequence that the model supports
    tie_embeddings: bool = False  # whether the output head is the transposed embedding
    rope_scaling: RopeScaling | None = None
    bos_id: int | None = None  # token that begins a text
    eos_id: int | tuple[int, ...] | None = None  # token or tokens that end a text

    family: str = "llama"  # a key of `families.FAMILIES`: the names of the weights in files
    activation: str = "silu"  # of the MLP; one of ACTIVATIONS
    gated_mlp: bool = True  # down(activation(gate(x)) * up(x)), or down(activation(up(x)))
    attention_bias: bool = False  # biases of q, k and v
    output_bias: bool = False  # bias of o
    mlp_bias: bool = False  # biases of gate, up and down

    num_experts: int = 0  # E, MLPs of width mlp_width to choose from; 0: one MLP for all tokens
    experts_per_token: int = 0
    normalize_experts: bool = True  # the router's probabilities of the chosen experts sum to 1
    router_loss: float = 0.0  # weight of the loss that balances the experts

    norm_places: str = "before"  # one of NORM_PLACES
    parallel: bool = False  # attention and MLP read the same input; needs norm_places="before"
    layer_norm: bool = False  # subtract the mean: LayerNorm instead of RMSNorm
    norm_scale: bool = True  # whether norms have weights
    norm_bias: bool = False  # whether norms have biases
    norm_offset: float = 0.0  # added to the weights of norms: 1 where files store them minus 1
    qk_norm: str = "none"  # norm of queries and keys: by head, of all heads, by head once rotated

    rotary_dim: int | None = None  # leading dimensions of a head that rotate; None: all
    window: int | None = None  # tokens that sliding layers see, the current one included; None: all
    sliding_layers: tuple[bool, ...] = ()  # which layers slide; (): all, if there is a window
    rope_layers: tuple[bool, ...] = ()  # which layers rotate queries and keys; (): all
    local_rope_theta: float | None = None  # unscaled base of sliding layers; None: as all others
    query_growth: float = 0.0  # queries grow by it for each e-fold of original_max_length

    attention_scale: float | None = None  # multiplies the scores; None: head_dim ** -0.5
    attention_cap: float | None = None  # c: scores become c * tanh(scores / c)
    logit_cap: float | None = None  # the same for the logits
    embedding_multiplier: float = 1.0  # multiplies the embeddings of tokens
    residual_multiplier: float = 1.0  # multiplies what a block adds to the residual stream
    logit_multiplier: float = 1.0  # multiplies the logits

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_length"):
            _require_positive(self, name, int)
        for name in ("rope_theta", "norm_eps", "embedding_multiplier", "residual_multiplier"):
            _require_positive(self, name, float)
        _require_positive(self, "logit_multiplier", float)
        for name in ("local_rope_theta", "attention_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) is not None:
                _require_positive(self, name, float)
        for name in ("window", "rotary_dim"):
            if getattr(self, name) is not None:
                _require_positive(self, name, int)
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                value = getattr(self, field.name)
                raise UserError(f"{field.name}={short(value)} must be true or false")
        for name, allowed in (
            ("activation", ACTIVATIONS),
            ("norm_places", NORM_PLACES),
            ("qk_norm", QK_NORMS),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={short(getattr(self, name))} is not supported; supported: "
                    f"{', '.join(map(repr, allowed))}"
                )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2 or (self.rotary_dim or 0) % 2:
            name = "head_dim" if self.head_dim % 2 else "rotary_dim"
            raise UserError(
                f"{name}={getattr(self, name)} must be even: rotary embeddings rotate pairs"
            )
        if self.rotary_dim is not None and self.rotary_dim > self.head_dim:
            raise UserError(f"rotary_dim={self.rotary_dim} exceeds head_dim={self.head_dim}")
        for name in ("sliding_layers", "rope_layers"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise UserError(
                    f"{name} has {len(getattr(self, name))} entries, but num_layers="
                    f"{self.num_layers}; give one for each layer"
                )
        if not 0 <= self.experts_per_token <= self.num_experts or (
            bool(self.num_experts) != bool(self.experts_per_token)
        ):
            raise UserError(
                f"experts_per_token={self.experts_per_token} must be between 1 and num_experts="
                f"{self.num_experts}, or both 0"
            )
        pairs, rope = (self.rotary_dim or self.head_dim) // 2, self.rope_scaling
        if rope is not None and rope.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                if len(getattr(rope, name)) != pairs:
                    raise UserError(
                        f"rope scaling: {name} has {len(getattr(rope, name))} entries; give one "
                        f"for each of the {pairs} rotary pairs of a head"
                    )
        if self.parallel and self.norm_places != "before":
            raise UserError(f"parallel needs norm_places='before', not {self.norm_places!r}")

    def with_layers(self, num_layers: int) -> DecoderConfig:
        """Returns the config of the first `num_layers` layers."""
        return dataclasses.replace(
            self,
            num_layers=num_layers,
            sliding_layers=self.sliding_layers[:num_layers],
            rope_layers=self.rope_layers[:num_layers],
        )

    def is_sliding(self, layer: int) -> bool:
        """Returns whether a layer sees only the last `window` tokens."""
        return self.window is not None and (not self.sliding_layers or self.sliding_layers[layer])


def _require_positive(config: Any, name: str, kind: type[int] | type[float]) -> None:
    value = getattr(config, name)
    allowed = int | float if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed):
        wanted = "an integer" if kind is int else "a number"
        raise UserError(f"{name}={short(value)} must be {wanted}")
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value} must be greater than 0 and finite")

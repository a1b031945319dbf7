"""What files from outside may contain: the only place that says so.

Model directories, GGUF files, exports and the folders of runs come from other people and other
programs. A reader parses a file with `read_json` or `models.gguf_file.read`, checks the values with
the schema of that file, a `Kind`, and then uses them. Keys that a schema does not have are ignored.

A value that does not fit is a `UserError` in one line: file, key, value, and what would fit.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lomo_jax.errors import UserError

MAX_DEPTH = 32  # of nested lists and objects
_SHOWN = 60  # characters of a wrong value in a message


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value must be; `a | b` accepts both."""

    text: str  # after "must be"
    fits: Callable[[Any], bool]
    # Of a list or object: name and value -> what is wrong with one of its parts, or None.
    inside: Callable[[str, Any], str | None] = lambda name, value: None

    def problem(self, name: str, value: Any) -> str | None:
        """Returns what is wrong with a value, or None."""
        if not self.fits(value):
            return f"{name}={short(value)} must be {self.text}"
        return self.inside(name, value)

    def check(self, value: Any, source: object = None) -> None:
        """Raises UserError unless a value fits; `source`, such as a file, begins the message."""
        if (problem := self.problem("", value)) is not None:
            start = "" if source is None else f"{source}: "
            raise UserError(f"{start}{problem.removeprefix('.')}")

    def __or__(self, other: Kind) -> Kind:
        def inside(name: str, value: Any) -> str | None:
            return (self if self.fits(value) else other).inside(name, value)

        return Kind(f"{self.text} or {other.text}", lambda x: self.fits(x) or other.fits(x), inside)


def short(value: object) -> str:
    """Returns a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


NULL = Kind("null", lambda x: x is None)
BOOLEAN = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a string", lambda x: isinstance(x, str))
ANY = Kind("anything", lambda x: True)


def integer(low: int, high: int) -> Kind:
    """Accepts integers in [low, high]."""
    return Kind(
        f"an integer from {low} to {high}",
        lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high,
    )


def number(low: float, high: float) -> Kind:
    """Accepts finite integers and floats in [low, high]."""
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda x: isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high,
    )


def choice(*values: Any) -> Kind:
    """Accepts some values."""
    return Kind(" or ".join(map(repr, values)), lambda x: any(x is v or x == v for v in values))


def list_of(item: Kind, longest: int = 10**7) -> Kind:
    """Accepts lists of at most `longest` items."""

    def inside(name: str, value: Any) -> str | None:
        problems = (item.problem(f"{name}[{index}]", part) for index, part in enumerate(value))
        return next((problem for problem in problems if problem is not None), None)

    return Kind(
        f"a list of at most {longest}", lambda x: isinstance(x, list) and len(x) <= longest, inside
    )


def object_of(item: Kind, key: Kind = TEXT) -> Kind:
    """Accepts objects with any keys; `item` is the kind of their values."""

    def inside(name: str, value: Any) -> str | None:
        for inner, part in value.items():
            if not key.fits(inner):
                return f"{name}: the key {short(inner)} must be {key.text}"
            where = f"{name}.{inner}" if _NAME.fits(inner) else f"{name}[{short(inner)}]"
            if (problem := item.problem(where, part)) is not None:
                return problem
        return None

    return Kind("an object", lambda x: isinstance(x, dict), inside)


def record(
    required: Mapping[str, Kind],
    optional: Mapping[str, Kind] | None = None,
    prefixed: Mapping[str, Kind] | None = None,
) -> Kind:
    """Accepts objects with these keys, keys that begin with those of `prefixed`, and any others."""
    kinds = {**required, **(optional or {})}
    by_prefix = prefixed or {}

    def inside(name: str, value: Any) -> str | None:
        for key in required:
            if key not in value:
                return f"the key {f'{name}.{key}'.removeprefix('.')!r} is missing"
        for key, kind in kinds.items():
            if key in value and (problem := kind.problem(f"{name}.{key}", value[key])) is not None:
                return problem
        for start, kind in by_prefix.items():
            for key in value:
                if not key.startswith(start):
                    continue
                if not _NAME.fits(key):
                    return f"{name}: the key {short(key)} must be {_NAME.text}"
                if (problem := kind.problem(f"{name}.{key}", value[key])) is not None:
                    return problem
        return None

    return Kind("an object", lambda x: isinstance(x, dict), inside)


def is_inside(name: str) -> bool:
    """Whether a file name is relative and stays in its folder."""
    path = PurePosixPath(name)
    is_name = bool(path.parts) and "\0" not in name and all(len(p) < 256 for p in path.parts)
    return is_name and not path.is_absolute() and ".." not in path.parts


def check_regular(path: Path) -> None:
    """Raises UserError for a pipe, socket or device, which would block or never end.

    A missing file and a folder are for the reader to report.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is not a regular file; replace it by one")


def depth_of(value: Any) -> int:
    """Returns how deep lists and objects are nested, without recursion."""
    depth, level = 0, [value]
    while level := [
        part
        for each in level
        if isinstance(each, list | dict)
        for part in (each.values() if isinstance(each, dict) else each)
        if isinstance(part, list | dict)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


# Sizes of models. The largest that exist are a tenth of these.
_LAYERS = integer(1, 10_000)
_HEADS = integer(1, 2**16)
_EXPERTS = integer(1, 2**12)
_WIDTH = integer(1, 2**24)
_LENGTH = integer(1, 2**31 - 1)  # positions are int32
_TOKEN = integer(0, 2**31 - 1)
_NAME = Kind(
    "a string of at most 200 printable characters",
    lambda x: isinstance(x, str) and x.isprintable() and len(x) <= 200,
)
_POSITIVE = number(1e-9, 1e9)
_EPS = number(1e-30, 1.0)
_THETA = number(2.0, 1e30)  # base of rotary frequencies
_SWITCH = BOOLEAN | NULL

_ROPE = record(
    {},
    {
        "rope_type": _NAME,
        "type": _NAME,
        "rope_theta": _THETA | NULL,
        "partial_rotary_factor": number(1e-3, 1.0) | NULL,
        "factor": _POSITIVE | NULL,
        "original_max_position_embeddings": integer(2, 2**31 - 1) | NULL,
        **dict.fromkeys(("low_freq_factor", "high_freq_factor"), _POSITIVE),
        **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"), _POSITIVE | NULL),
        **dict.fromkeys(("mscale", "mscale_all_dim"), number(0.0, 1e9) | NULL),
        "llama_4_scaling_beta": number(0.0, 1e9) | NULL,
        "alpha": number(0.0, 1e9) | NULL,
        "truncate": BOOLEAN,
        **dict.fromkeys(("short_factor", "long_factor"), list_of(_POSITIVE, 2**16)),
    },
)

# config.json of a model, in the names of transformers.
MODEL_CONFIG = record(
    {},
    {
        "architectures": list_of(_NAME, 100) | NULL,
        "model_type": _NAME | NULL,
        "vocab_size": _WIDTH,
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS | NULL,
        "head_dim": _HEADS | NULL,
        "max_position_embeddings": _LENGTH,
        "original_max_position_embeddings": integer(2, 2**31 - 1) | NULL,
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), _EPS),
        "bos_token_id": _TOKEN | NULL,
        "eos_token_id": _TOKEN | list_of(_TOKEN, 1000) | NULL,
        **dict.fromkeys(("hidden_act", "hidden_activation"), _NAME | NULL),
        **dict.fromkeys(("tie_word_embeddings", "mlp_bias", "attention_out_bias"), BOOLEAN),
        **dict.fromkeys(("use_bias", "use_qkv_bias", "use_parallel_residual"), BOOLEAN),
        "norm_topk_prob": BOOLEAN,
        **dict.fromkeys(("attention_bias", "output_router_logits"), _SWITCH),
        **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention"), _SWITCH),
        "rope_theta": _THETA | NULL,
        "rope_local_base_freq": _THETA,
        "partial_rotary_factor": number(1e-3, 1.0) | NULL,
        "rope_scaling": _ROPE | NULL,
        "rope_parameters": record(
            {}, {"sliding_attention": _ROPE | NULL, "full_attention": _ROPE | NULL}
        )
        | NULL,
        "sliding_window": _LENGTH | NULL,
        **dict.fromkeys(
            ("sliding_window_pattern", "_sliding_window_pattern"),
            integer(0, 10_000) | _NAME | NULL,
        ),
        "layer_types": list_of(_NAME, 10_000) | NULL,
        "max_window_layers": integer(0, 2**31 - 1),
        "no_rope_layer_interval": _LAYERS,
        "no_rope_layers": list_of(BOOLEAN | integer(0, 1), 10_000) | NULL,
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _POSITIVE | NULL),
        **dict.fromkeys(("query_pre_attn_scalar", "logits_scaling", "logit_scale"), _POSITIVE),
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), _POSITIVE),
        "residual_multiplier": _POSITIVE,
        "num_local_experts": _EXPERTS | NULL,
        "num_experts": _EXPERTS,
        "num_experts_per_tok": _EXPERTS,
        "moe_intermediate_size": _WIDTH,
        "router_aux_loss_coef": number(0.0, 1e9),
    },
)

# model.safetensors.index.json.
_SHARD = Kind(
    "the name of a .safetensors file in the same folder",
    lambda x: _NAME.fits(x) and is_inside(x) and x.endswith(".safetensors"),
)
WEIGHTS_INDEX = record({"weight_map": object_of(_SHARD)})

_SPECIAL = TEXT | record({"content": TEXT}) | NULL
_TEMPLATE = TEXT | list_of(record({"name": TEXT, "template": TEXT})) | object_of(TEXT) | NULL
_SIDE = choice("left", "right")
_ID_AS_TEXT = Kind("a token as digits", lambda x: x.isdecimal() and x.isascii() and len(x) < 11)

# The JSON files of a tokenizer by name.
TOKENIZER_FILES = {
    "tokenizer.json": record(
        {
            "model": record(
                {}, {"vocab": object_of(_TOKEN) | list_of(ANY), "merges": list_of(ANY)}
            ),
            "added_tokens": list_of(record({"id": _TOKEN, "content": TEXT})),
        }
    ),
    "tokenizer_config.json": record(
        {},
        {
            "tokenizer_class": TEXT | NULL,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _SPECIAL),
            **dict.fromkeys(("sep_token", "cls_token", "mask_token"), _SPECIAL),
            "additional_special_tokens": list_of(_SPECIAL) | NULL,
            "added_tokens_decoder": object_of(record({"content": TEXT}), key=_ID_AS_TEXT) | NULL,
            "chat_template": _TEMPLATE,
            "model_max_length": number(1, 1e40) | NULL,
            "model_input_names": list_of(TEXT, 100),
            **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
            **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), _SWITCH),
            **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens"), _SWITCH),
        },
    ),
    "special_tokens_map.json": object_of(_SPECIAL | list_of(_SPECIAL)),
    "added_tokens.json": object_of(_TOKEN),
    "vocab.json": object_of(_TOKEN),
}

# adapter_config.json of PEFT, as far as `peft_files` uses it.
ADAPTER_CONFIG = record(
    {"r": integer(1, 2**16), "lora_alpha": number(-1e9, 1e9)},
    {"use_rslora": BOOLEAN},
)

# A longer token would take quadratic time where merges are computed.
_PIECE = Kind("a token of at most 1024 characters", lambda x: isinstance(x, str) and len(x) <= 1024)
_MERGE = Kind("two tokens and a space", lambda x: isinstance(x, str) and len(x.split(" ")) == 2)


def gguf_metadata(architecture: object) -> Kind:
    """Returns the schema of the metadata of a GGUF file."""
    sizes = {
        **dict.fromkeys(("embedding_length", "feed_forward_length", "vocab_size"), _WIDTH),
        **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), _HEADS),
        "attention.key_length": _HEADS,
        "block_count": _LAYERS,
        "context_length": _LENGTH,
        "attention.sliding_window": _LENGTH,
        "attention.layer_norm_rms_epsilon": _EPS,
        "rope.freq_base": _THETA,
        "rope.scaling.type": _NAME,
        "rope.scaling.factor": _POSITIVE,
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _POSITIVE),
        "expert_count": integer(0, 2**16),
    }
    tokenizer = {
        **dict.fromkeys(("model", "pre"), _NAME),
        "tokens": list_of(_PIECE),
        "token_type": list_of(integer(0, 100)),
        "scores": list_of(number(-1e30, 1e30)),
        "merges": list_of(_MERGE),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), _TOKEN),
        **dict.fromkeys(("unknown_token_id", "padding_token_id"), _TOKEN),
        **dict.fromkeys(("add_bos_token", "add_space_prefix"), BOOLEAN),
    }
    return record(
        {"general.architecture": _NAME},
        {f"{architecture}.{key}": kind for key, kind in sizes.items()}
        | {f"tokenizer.ggml.{key}": kind for key, kind in tokenizer.items()}
        | {"tokenizer.chat_template": TEXT},
    )


_STEP = integer(0, 2**53)
_FINITE = number(-1e39, 1e39)  # the range of float32
_MEASURED = _FINITE | NULL  # null where it was not finite

# A line of metrics.jsonl; see `run_files`.
METRICS_RECORD = record(
    {"step": _STEP, "time": number(0, 2**36)},
    {
        **dict.fromkeys(("loss", "learning_rate", "accuracy", "tokens_per_second"), _MEASURED),
        **dict.fromkeys(("flop_utilisation", "device_memory_gib", "grad_norm"), _MEASURED),
        "loss_scale": _MEASURED,
        "skipped": _STEP,
        **dict.fromkeys(("prompt", "sample"), TEXT),
        "resumed": BOOLEAN,
    },
    {"eval_": _MEASURED},
)

# A line of evaluations.jsonl; see `run_files`.
EVALUATION_RECORD = record(
    {"step": _STEP, "time": number(0, 2**36), "metrics": object_of(_FINITE | NULL, key=_NAME)},
    {"limit": _STEP | NULL, "num_fewshot": _STEP | NULL, "examples": _STEP},
)

_GIB = number(0.0, 1e9)

# run.json of a run.
RUN_INFO = record(
    {
        **dict.fromkeys(("source", "device"), TEXT),
        "parameters": integer(0, 2**53),
        **dict.fromkeys(("devices", "processes"), integer(1, 10**6)),
        "versions": object_of(TEXT),
        "memory": record(
            {
                **dict.fromkeys(("weights_gib", "state_gib", "layer_inputs_gib"), _GIB),
                "temporaries_gib": _FINITE,
                **dict.fromkeys(("host_gib", "total_gib"), _GIB),
                **dict.fromkeys(("device_gib", "usable_gib"), _GIB | NULL),
                "fits": BOOLEAN | NULL,
                "gpu": TEXT,
                "devices": integer(1, 10**6),
            }
        ),
    }
)

# config.json of a run, as far as reports and exports use it; `training.validation` checks the rest.
_PATHS = TEXT | list_of(TEXT, 10**5) | object_of(_FINITE)
RUN_CONFIG = record(
    {
        "steps": _STEP,
        "param_dtype": choice("float32", "bfloat16", "float16"),
        "dynamic_loss_scale": BOOLEAN,
        "eval_batches": _STEP | NULL,
        **dict.fromkeys(("batch_size", "sequence_length"), integer(1, 2**53)),
        **dict.fromkeys(("optimizer", "schedule", "workdir"), TEXT),
        "learning_rate": _FINITE,
        "model": record({"path": TEXT | NULL, "init": TEXT}),
        "lora": record(
            {
                "rank": integer(1, 2**24) | NULL,
                "alpha": _FINITE,
                "targets": TEXT | list_of(TEXT, 100),
                "base": TEXT,
            }
        ),
        "data": record(
            {
                "path": _PATHS | NULL,
                "validation_path": TEXT | list_of(TEXT, 10**5) | NULL,
                "eval_fraction": _FINITE,
                "eval_documents": _STEP | NULL,
            }
        ),
    }
)

_SUMS = list_of(integer(0, 2**32 - 1))

# What a checkpoint says about itself.
CHECKPOINT = record(
    {
        "progress": record(
            {
                "step": _STEP,
                "data": object_of(ANY),
                "evaluated": integer(-1, 2**53),
                "best": _FINITE | NULL,
                "best_step": _STEP | NULL,
                **dict.fromkeys(("skipped", "skipped_in_a_row"), _STEP),
            }
        ),
        "config": RUN_CONFIG,
        "dataset": TEXT,
        "checksums": record(
            dict.fromkeys(("params", "optimizer"), _SUMS),
            dict.fromkeys(("loss_scale", "rounding"), _SUMS),
        ),
    },
    {"base": _SUMS | NULL},
)

# The manifest of an export.
_OWN_FILE = Kind("the name of a file in the same folder", is_inside)
EXPORT = record(
    {
        "format": choice(1),
        "files": object_of(record({"size": integer(0, 2**63 - 1), "sha256": TEXT}), key=_OWN_FILE),
    }
)

"""The fields of a run's config, and what is made of them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optax

from lomo_jax.data import resolve
from lomo_jax.errors import ConfigError
from lomo_jax.fused import Offload
from lomo_jax.models.config import DecoderConfig
from lomo_jax.training.step import make_optimizer, make_schedule

if TYPE_CHECKING:  # slow to import
    from lomo_jax.lora import LoRA

FROZEN = "frozen"  # as the optimizer of the base: it is not trained
AUTO_REMATS = ("products", "attention", "full")  # the fastest first, which needs most memory


@dataclasses.dataclass
class ModelConfig:
    """The model to start from."""

    # Weights and tokenizer: a Hugging Face directory, the id of a model on the hub (owner/name or
    # owner/name@revision), a .gguf file, the workdir of an earlier run (its last checkpoint), or
    # one checkpoint of such a run.
    path: str | None = None
    init: str = "checkpoint"  # or "random": new weights, and `path` only gives the tokenizer
    # Used with random weights, and for plans without a path.
    architecture: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)


@dataclasses.dataclass
class DataConfig:
    """The dataset for training and evaluation."""

    # A file, folder, glob, package://NAME/FOLDER in an installed package, or OWNER/NAME@CONFIG on
    # the Hugging Face Hub; :SPLIT selects a split of a folder or of the hub, by default :train.
    # Several of one kind: ('a.jsonl', 'b.jsonl'); several sources, by weight: {'a': 0.7, 'b': 0.3}.
    path: dict[str, float] | tuple[str, ...] | str | None = None
    validation_path: tuple[str, ...] | str | None = None  # the held-out data, if not a part of path
    eval_fraction: float = 0.05  # fraction of the examples to hold out
    eval_documents: int | None = None  # number of examples to hold out, instead of the fraction
    format: str | None = None  # text, instruction, prompt or chat; None: the columns tell
    text_key: str = "text"  # column of a text
    # A file of Jinja, or Jinja source: for chats in place of the tokenizer's chat template, for
    # other records a template of their columns.
    template: str | None = None
    train_on: str = "answers"  # or "all": the loss is on prompts too; on a text it always is on all
    packing: bool = True  # examples share rows; False: a row has one example
    too_long: str = "cut"  # an example longer than sequence_length is cut at its end; "leave_out"
    repeated: str = "leave_out"  # examples that are the same as an earlier one; or "keep"
    special_tokens: str = "parse"  # those that a text spells out; or "text": they are ordinary text

    def __post_init__(self) -> None:
        for name in ("path", "validation_path"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))


@dataclasses.dataclass
class MeshConfig:
    """Number of devices on each axis; -1 means all the remaining ones."""

    data: int = 1  # replicas of the model; each gets a part of the batch
    fsdp: int = -1  # shards of model and batch; each layer is gathered before its use
    tensor: int = 1  # shards of each matrix product: heads, MLP width and vocabulary


@dataclasses.dataclass
class LoraConfig:
    """Adapters: with a rank, `optimizer`, `learning_rate` and the like are for them alone."""

    rank: int | None = None  # of each adapter; None: no adapters, all parameters are trained
    alpha: float = 16.0  # multiplies the output of an adapter, divided by the rank
    targets: tuple[str, ...] | str = "all"  # or some of q, k, v, o, gate, up, down: "('q', 'v')"
    rank_stabilized: bool = False  # divides alpha by the root of the rank (rsLoRA)
    dropout: float = 0.0  # the part of an adapter's inputs that is set to zero in training
    path: str | None = None  # PEFT's folder of adapters to start from; None: new ones
    quantize: str = "none"  # or "int8", "nf4": the linear maps of a frozen base in 8 or 4 bits
    base: str = "frozen"  # or the optimizer of all other parameters: "lomo", "adalomo", ...
    base_learning_rate: float = 5e-3  # the peak of their schedule
    base_schedule: str | None = None  # None: the same as `schedule`
    base_warmup: float | None = None  # None: the same as `warmup`
    base_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)  # as optimizer_kwargs

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            self.targets = tuple(self.targets)

    @property
    def is_frozen(self) -> bool:
        """Whether only adapters are trained."""
        return self.rank is not None and self.base == FROZEN

    def adapters(self) -> "LoRA | None":
        """Returns the adapters, if there are any."""
        if self.rank is None:
            return None
        from lomo_jax.lora import LoRA

        return LoRA(self.rank, self.alpha, self.targets, self.rank_stabilized, self.dropout)


@dataclasses.dataclass
class Config:
    """One run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    optimizer: str = "adalomo"  # or "lomo", or any optimizer of optax or optax.contrib: "adamw"
    optimizer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    # What a weight decay is for: "matrices" (not norms, biases and embeddings), "all", or a regular
    # expression that is searched in a parameter's name, such as "layers/.*/kernel".
    decay_mask: str = "matrices"
    learning_rate: float = 1e-3  # the peak of the schedule
    schedule: str = "cosine"  # or "linear", both to 0 at the end of the run, or "constant"
    warmup: float = 0.03  # below 1 a fraction of `steps`, from 1 on a number of steps
    fused: bool = True  # False runs reference_step, which holds the whole gradient
    microbatches: int = 1  # parts of a batch that run through a layer one after the other
    clip_norm: float | None = None  # bound on the global gradient norm; 1.7 times as slow
    dynamic_loss_scale: bool = False  # for float16: skips steps that overflow; as slow as clip_norm
    skip_nonfinite: int = 0  # NaN or infinite updates in a row to skip before the run stops
    rounding: str = "nearest"  # or "stochastic", which preserves small updates of bfloat16 weights
    # What the backward pass recomputes: "full": whole layers; "attention": all but attention;
    # "products": only what is cheap; "none". Or "auto": as little as fits the memory of the GPU.
    remat: str = "full"
    offload: Offload = dataclasses.field(default_factory=Offload)  # arrays to store in host memory
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    attention: str = "auto"  # cuDNN where it is supported; or "xla", "cudnn", "pallas"

    batch_size: int = 8  # sequences per step
    sequence_length: int = 512  # tokens
    steps: int = 1000
    epochs: float | None = None  # passes over the training split, which then set `steps`
    param_dtype: str = "bfloat16"  # of the weights, in training and in the export
    seed: int = 0

    eval_every: int = 100  # steps; 0: only before the first step and after the last one
    eval_batches: int | None = None  # limit on held-out batches per evaluation; None: all
    log_every: int = 10  # steps
    # Tasks whose accuracy is measured at each evaluation: superglue/boolq and the like, a file of
    # questions (.jsonl), or tasks of lm-evaluation-harness, "('boolq', 'piqa')".
    eval_tasks: tuple[str, ...] | str | None = None
    eval_examples: int = 200  # limit on the examples of each task
    eval_data: tuple[str, ...] | str | None = None  # folders with their data; None: from the hub
    prompt: str = ""  # the model continues it at each evaluation, as a sample; "": no sample
    prompt_tokens: int = 48  # length of the sample
    wandb: str | None = None  # Weights & Biases project to log to, in addition to workdir

    workdir: str = "runs/default"  # everything that the run writes; one run at a time
    resume: str = (
        "auto"  # from the last checkpoint, if any; "must": it is an error if there is none; "never"
    )
    checkpoint_every: int = 100  # steps; 0: only by time, at the end and when stopped
    checkpoint_minutes: float = 30.0  # time after which the next step saves one; 0: no limit
    # Keep the checkpoint with the lowest held-out loss as well; or with the best value of another
    # metric of an evaluation: "accuracy", "boolq_acc".
    keep_best: bool | str = True
    keep_checkpoints: int = 1  # number of last checkpoints; each is as large as weights and state

    def __post_init__(self) -> None:
        for name in ("eval_tasks", "eval_data"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))

    def task_names(self) -> tuple[str, ...]:
        """Returns the names of `eval_tasks`."""
        return _names(self.eval_tasks)

    def task_folders(self) -> list[Path]:
        """Returns the folders of `eval_data`."""
        return [Path(resolve(name)) for name in _names(self.eval_data)]

    def best_metric(self) -> str:
        """Returns the name of the metric that says which checkpoint is the best."""
        return self.keep_best if isinstance(self.keep_best, str) else "loss"

    def make_schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the number of finished steps."""
        return make_schedule(self.schedule, self.learning_rate, self.steps, self.warmup)

    def make_optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer, with the schedule."""
        optimizer = make_optimizer(
            self.optimizer,
            self.make_schedule(),
            self.optimizer_kwargs,
            decay_mask=self.decay_mask,
        )
        lora = self.lora
        if lora.rank is None or lora.is_frozen:
            return optimizer
        from lomo_jax.lora import partition

        schedule = make_schedule(
            lora.base_schedule or self.schedule,
            lora.base_learning_rate,
            self.steps,
            self.warmup if lora.base_warmup is None else lora.base_warmup,
        )
        base = make_optimizer(
            lora.base,
            schedule,
            lora.base_kwargs,
            field="lora.base",
            decay_mask=self.decay_mask,
        )
        return partition(optimizer, base)

    def remats(self) -> tuple[str, ...]:
        """Returns the values of `remat` to try until one fits, the fastest first."""
        if self.remat != "auto":
            return (self.remat,)
        # Not "none": moving what it saves takes longer than computing it again. For the same reason
        # no products in host memory, though on some GPUs they are faster.
        return ("attention", "full") if self.offload.activations else AUTO_REMATS

    def step_options(self) -> dict[str, Any]:
        """Returns the fields that are options of `step.make_step`, by name."""
        names = ("fused", "microbatches", "clip_norm", "dynamic_loss_scale", "skip_nonfinite")
        options = {name: getattr(self, name) for name in (*names, "rounding", "remat", "offload")}
        if not self.lora.is_frozen:
            return options
        from lomo_jax.lora import is_adapter

        return options | {"trainable": is_adapter}


def _names(value: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else tuple(filter(None, (value or "").split(",")))


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain dictionaries, for JSON."""
    return dataclasses.asdict(config)


def set_fields(config: Config, values: dict[str, Any]) -> Config:
    """Returns a copy of a config with new values of some fields, such as "offload.params".

    Raises:
      ConfigError: The values do not fit together.
    """

    def replace(node: Any, prefix: str) -> Any:
        # All fields of a node at once: a number of heads alone may not fit the other sizes.
        changes = {}
        for field in dataclasses.fields(node):
            name, value = prefix + field.name, getattr(node, field.name)
            if name in values:
                changes[field.name] = values[name]
            elif dataclasses.is_dataclass(value):
                changes[field.name] = replace(value, f"{name}.")
        try:
            return dataclasses.replace(node, **changes)
        except ValueError as error:
            raise ConfigError(f"{prefix.rstrip('.')}: {error}") from None

    return replace(config, "")

"""lm-evaluation-harness on a model of this library: its tasks, without an export.

Needs the package `lm_eval`, the extra `eval`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx

from lomo_jax import models
from lomo_jax.errors import UserError, did_you_mean
from lomo_jax.evaluation import datasets
from lomo_jax.evaluation.choices import (
    encode,
    encode_pair,
    first_token,
    log_likelihoods_of_pairs,
)
from lomo_jax.evaluation.datasets import first_line
from lomo_jax.models.generation import cut_at, end_tokens

if importlib.util.find_spec("lm_eval") is None:
    raise UserError("tasks need lm_eval: pip install 'lomo_jax[eval]'")

import lm_eval.api.model  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

_NEW_TOKENS = 256  # of an answer whose task does not say how long it may be
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class LM(lm_eval.api.model.LM):
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Use it under the mesh that its parameters are sharded over. A prompt that is longer than the
    model loses its beginning, as with the harness's own models; `cut` counts them.

    Args:
      graphdef: The structure of a `models.Decoder`.
      params: Its parameters.
      tokenizer: Its tokenizer.
      batch_size: Prompts that are read or continued together.
      on_batch: Called before each batch.

    Raises:
      UserError: lm_eval is not installed.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[models.Decoder],
        params: nnx.State,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        on_batch: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.graphdef, self.params, self.tokenizer = graphdef, params, tokenizer
        self.config = nnx.merge(graphdef, params).config
        self.batch_size, self.on_batch = batch_size, on_batch
        self.cut = 0  # prompts that lost their beginning

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether it is the greedy one) of each continuation."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        return self._score([self._fit(*pair) for pair in pairs])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Returns the log-likelihood of each text, in windows of the model's length."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

        texts = []
        for request in requests:
            tokens = encode(self.tokenizer, request.args[0], special=False)
            length, first = self.config.max_length, first_token(self.tokenizer)
            windows = get_rolling_token_windows(tokens, first, length, context_len=1)
            texts.append(list(map(make_disjoint_window, windows)))
        scores = iter(self._score([window for windows in texts for window in windows]))
        return [sum(next(scores)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Returns the text that follows each prompt, up to a string that ends it."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            prompts = [requests[number].args[0] for number in numbers]
            found.update(zip(numbers, self._generate(prompts, settings), strict=True))
        return [found[number] for number in range(len(requests))]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template of conversations."""
        return str(self.tokenizer.chat_template) if chat_template else None

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        found = log_likelihoods_of_pairs(
            self.graphdef,
            self.params,
            [[pair] for pair in pairs],
            batch_size=self.batch_size,
            on_batch=self.on_batch,
        )
        return [(each.log_likelihood, each.is_greedy) for (each,) in found]

    def _fit(self, prompt: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Cuts a prompt at its beginning to the length of the model."""
        room = self.config.max_length + 1 - len(continuation)
        if len(prompt) <= room:
            return prompt, continuation
        if room < 1:
            raise UserError(
                f"an answer of a task has {len(continuation)} tokens, more than the model's "
                f"max_length={self.config.max_length}"
            )
        self.cut += 1
        return prompt[-room:], continuation

    def _generate(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        new = int(next((settings[name] for name in lengths if settings.get(name)), _NEW_TOKENS))
        room = self.config.max_length - new
        if room < 1:
            raise UserError(
                f"a task asks for {new} new tokens, and the model's max_length is "
                f"{self.config.max_length}; set --gen_kwargs max_gen_toks=N"
            )
        tokens = [encode(self.tokenizer, prompt) for prompt in prompts]
        self.cut += sum(len(row) > room for row in tokens)
        sampling = models.Sampling()
        if settings.get("do_sample", settings.get("temperature", 0) > 0):
            found: Any = {name: settings[name] for name in _SAMPLING if name in settings}
            sampling = models.Sampling(**{"temperature": 1.0} | found)

        def is_finished(row: list[int]) -> bool:
            text = self.tokenizer.decode(row)
            return any(stop in text for stop in until)

        rows = models.generate(
            self.graphdef,
            self.params,
            [row[-room:] for row in tokens],
            new,
            sampling=sampling,
            stop_tokens=end_tokens(self.config, self.tokenizer),
            is_finished=is_finished if until else None,
            batch_size=self.batch_size,
            on_batch=self.on_batch,
        )
        decode = functools.partial(self.tokenizer.decode, skip_special_tokens=True)
        return [cut_at(str(decode(row)), until) for row in rows]


class HarnessTasks:
    """Tasks of the harness, read once and evaluated as often as one likes.

    Args:
      names: Names of tasks and groups, such as "boolq" or "mmlu".
      data: Folders with their data, see `datasets.find`; none: the Hugging Face Hub.
      num_fewshot: Examples before each question, instead of what the task says.

    Raises:
      UserError: There is no such task, or its data cannot be read.
    """

    def __init__(
        self, names: Sequence[str], *, data: Sequence[Path] = (), num_fewshot: int | None = None
    ) -> None:
        self.num_fewshot = num_fewshot
        with _quiet():
            manager = _manager()
            for name in names:
                if name not in manager.all_tasks:
                    hint = did_you_mean(name, manager.all_tasks)
                    raise UserError(
                        f"there is no task {name!r} in lm_eval"
                        + (hint or "; `lm-eval ls tasks` lists them")
                    )
            with _data_from(data):
                try:
                    self.tasks = manager.load_task_or_group(list(names))
                except UserError:
                    raise
                except Exception as error:  # the hub, the network, datasets
                    raise UserError(
                        f"the data of {', '.join(names)} cannot be read "
                        f"({first_line(error)}); give a folder with it: --data DIR"
                    ) from error

    def evaluate(
        self, lm: LM, *, limit: int | None = None, gen_kwargs: str | None = None
    ) -> dict[str, Any]:
        """Returns the results of `lm_eval.evaluate`, as it writes them to JSON.

        Args:
          lm: The model.
          limit: The largest number of examples of each task.
          gen_kwargs: Settings of generation, such as "temperature=0.8,max_gen_toks=64".

        Raises:
          UserError: A task does not fit the model.
        """
        with _quiet():
            from lm_eval import evaluator  # pyright: ignore[reportMissingImports]

            for task in _leaves(self.tasks):
                if self.num_fewshot is not None:
                    task.set_config(key="num_fewshot", value=self.num_fewshot)
                if gen_kwargs and task.config.output_type == "generate_until":
                    from lm_eval.utils import simple_parse_args_string  # pyright: ignore[reportMissingImports]

                    values = simple_parse_args_string(gen_kwargs)
                    task.set_config(key="generation_kwargs", value=values, update=True)
                task.set_fewshot_seed(seed=1234)  # the harness's
            found = evaluator.evaluate(
                lm, self.tasks, limit=limit, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
            )
        assert found is not None
        return dict(found)


@functools.cache
def _manager() -> Any:
    """Returns the index of the harness's tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager()


def _leaves(tasks: dict[Any, Any]) -> Iterator[Any]:
    for value in tasks.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


@contextlib.contextmanager
def _data_from(folders: Sequence[Path]) -> Iterator[None]:
    """Lets tasks read their data from folders, in place of the hub."""
    if not folders:
        yield
        return
    from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

    def download(self: Any, dataset_kwargs: Any = None, **_: Any) -> None:
        path, name = str(self.DATASET_PATH), self.DATASET_NAME
        parts = [[self.config.task], [path, name], [path.rpartition("/")[2], name], [name]]
        names = dict.fromkeys("/".join(filter(None, part)) for part in parts)
        self.dataset = datasets.read(datasets.find(folders, [each for each in names if each]))
        for split in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if getattr(self.config, split) not in self.dataset:
                setattr(self.config, split, None)
        if self.config.test_split is self.config.validation_split is None:
            raise UserError(
                f"--data: the data of {self.config.task} have only {', '.join(self.dataset)}, and "
                "not the split that the task evaluates"
            )
        _check_target(self)

    before = ConfigurableTask.download
    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = before


def _check_target(task: Any) -> None:
    """Raises UserError if the column of the right answer is missing: all would count as wrong."""
    target, columns = task.config.doc_to_target, next(iter(task.dataset.values())).column_names
    is_name = isinstance(target, str) and re.fullmatch(r"[A-Za-z_]\w*", target)
    if is_name and task.config.process_docs is None and target not in columns:
        raise UserError(
            f"--data: the data of {task.config.task} have no column {target!r}, which has the "
            f"right answer; they have {', '.join(columns)}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the harness, which logs, warns and shows bars for each task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

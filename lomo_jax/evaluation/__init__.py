"""What a model can do: the likelihood of choices, answers to tasks, lm-evaluation-harness."""

from typing import TYPE_CHECKING

from lomo_jax import _lazy

if TYPE_CHECKING:
    from lomo_jax.evaluation.choices import Answers as Answers
    from lomo_jax.evaluation.choices import Question as Question
    from lomo_jax.evaluation.choices import answer as answer
    from lomo_jax.evaluation.choices import encode_pair as encode_pair
    from lomo_jax.evaluation.harness import LM as LM
    from lomo_jax.evaluation.likelihood import Likelihood as Likelihood
    from lomo_jax.evaluation.likelihood import log_likelihoods as log_likelihoods
    from lomo_jax.evaluation.loading import Loaded as Loaded
    from lomo_jax.evaluation.loading import load as load
    from lomo_jax.evaluation.tasks import Tasks as Tasks

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        "choices": ["Answers", "Question", "answer", "encode_pair"],
        "harness": ["LM"],
        "likelihood": ["Likelihood", "log_likelihoods"],
        "loading": ["Loaded", "load"],
        "tasks": ["Tasks"],
    },
)

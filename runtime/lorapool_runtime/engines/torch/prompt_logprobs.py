"""Log-probabilities of prompt tokens, from the logits of the rows before them.

The runner returns the logits of every row of such a chunk, at most `max_batch_tokens` per step. They are processed in
parts, so that no second tensor of that size is allocated.
"""

from __future__ import annotations

from torch import Tensor

from lorapool_runtime.engines.torch.sampling import token_logprobs
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan

_ROWS_AT_ONCE = 32


def score_prompts(plan: StepPlan, logits: Tensor) -> Tensor:
    """Stores the log-probabilities of the step's prompt tokens in the sequences that requested them.

    logits: [rows, vocabulary] of all chunks' `logit_rows`. Returns [rows, vocabulary] of the chunks that sample.
    """
    if not any(chunk.sequence.scores_prompt for chunk in plan.chunks):
        return logits
    begin, sampling = 0, []
    for chunk in plan.chunks:
        end = begin + len(chunk.logit_rows)
        if chunk.sequence.scores_prompt:
            _score(chunk, logits[begin:end])
        if chunk.samples:
            sampling.append(end - 1)
        begin = end
    return logits[sampling]


def _score(chunk: Chunk, logits: Tensor) -> None:
    """logits: [tokens of the chunk, vocabulary]."""
    sequence = chunk.sequence
    count = sequence.request.prompt_logprobs or 0
    following = sequence.tokens[chunk.start + 1 : chunk.start + 1 + chunk.num_tokens]
    scores = [
        one
        for at in range(0, len(following), _ROWS_AT_ONCE)
        for one in token_logprobs(logits[at : at + _ROWS_AT_ONCE], following[at : at + _ROWS_AT_ONCE], count)
    ]
    sequence.score(chunk.start, scores)

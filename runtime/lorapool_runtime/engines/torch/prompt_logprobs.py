"""Log-probabilities of prompts: what the rows that a prompt has already say about the token that follows each.

`core` calls it between the runner and the sampling. The runner keeps every row of a chunk of such a request, at most
`max_batch_tokens` of them a step; they are worked through in pieces, so that no second tensor of that size is made.
"""

from __future__ import annotations

from torch import Tensor

from lorapool_runtime.engines.torch.sampling import token_logprobs
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan

_ROWS_AT_ONCE = 32


def score_prompts(plan: StepPlan, logits: Tensor) -> Tensor:
    """Tells every sequence of the plan that asked what its prompt's tokens were worth.

    logits: [rows, vocabulary] of all chunks' `logit_rows` -> [rows, vocabulary] of the chunks that sample.
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

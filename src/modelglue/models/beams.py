"""Beam search: several continuations of one prompt are kept, and the most probable finished one wins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from modelglue.errors import UserError
from modelglue.models.greedy import Stops
from modelglue.models.joining import JoiningReader


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation: ids without the one that ended it, sum of log probabilities (that one's included), and the score."""

    ids: list[int]
    total: float
    score: float


def beam_search(
    reader: JoiningReader,
    ids: Sequence[int],
    *,
    width: int,
    steps: int,
    ends: Collection[int],
    stops: Stops,
    length_penalty: float = 1.0,
) -> list[Hypothesis]:
    """At most `width` continuations of at most `steps` ids, the best first; none where the model's logits are no numbers.

    A continuation ends with an end id or a stop string. Scores are sums of log probabilities divided by length ** length_penalty, the
    id that ends a text counted. The search goes on until no beam can still beat the worst of `width` finished ones. All beams of a
    prompt are one batch; caches are reordered with them. Raises UserError for a reader whose cache cannot be.
    """
    import torch

    if len(ids) + steps > reader.reorderable and width > 1:
        raise UserError(
            "beam search needs a cache that can be reordered, and this model's cannot be (or its window is shorter than the text). "
            "Use one beam."
        )

    def scored(total: float, length: int) -> float:
        return float(total / max(length, 1) ** length_penalty)

    finished: list[Hypothesis] = []
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    logits, past = reader.read([ids], keep=1)
    for step in range(1, steps + 1):
        values = logits[:, -1].double().log_softmax(dim=-1)  # [beams, V]
        if not bool(values.max(dim=-1).values.isfinite().all()):
            return []
        totals = (values + torch.tensor([total for _, total in beams], device=values.device)[:, None]).flatten()
        # Every beam can end in each of its end ids; that many more candidates leave `width` that go on.
        best = totals.topk(min(width * (1 + len(ends)), len(totals)))
        going: list[tuple[int, list[int], float]] = []
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            beam, token = divmod(place, values.shape[1])
            written = [*beams[beam][0], token]
            if len(going) == width or total == -float("inf"):
                break
            if token in ends:
                finished.append(Hypothesis(written[:-1], total, scored(total, step)))
            elif step == steps or stops.reached(written):
                finished.append(Hypothesis(written, total, scored(total, step)))
            else:
                going.append((beam, written, total))
        finished = sorted(finished, key=lambda found: -found.score)[:width]
        if not going or (len(finished) == width and _settled(finished[-1], max(total for _, _, total in going), step, steps, scored)):
            break
        beams = [(written, total) for _, written, total in going]
        past = reader.pick(past, [beam for beam, _, _ in going])
        chosen = torch.tensor([written[-1] for written, _ in beams], device=logits.device)
        logits, past = reader.step(chosen, past)
    return finished


def _settled(worst: Hypothesis, best_total: float, step: int, steps: int, scored: Callable[[float, int], float]) -> bool:
    """Whether no beam can still get among the finished ones: its sum only falls, its length may grow up to `steps`."""
    return worst.score >= max(scored(best_total, step + 1), scored(best_total, steps))

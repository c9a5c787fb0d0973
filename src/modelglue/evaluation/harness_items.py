"""Documents of one task of the harness become items, with keys that change with all that their values depend on."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelglue.errors import UserError, did_you_mean
from modelglue.evaluation.items import Generation, Item, Request
from modelglue.evaluation.marking import HarnessMarker, takes_first

#: part of every item's key: raise it when the same replies would be marked otherwise, or requests be answered otherwise
_VERSION = 2
#: the harness's own default
_MAX_NEW_TOKENS = 256
#: output types that give one value in [0, 1] per item
_OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "generate_until")


def items_of(task: Any, metric: str | None, place: str) -> Iterator[Item]:
    import lm_eval

    name = task.task_name
    output_type = task.config.output_type
    if output_type not in _OUTPUT_TYPES:
        raise UserError(f"task '{name}'{place}: output_type is {output_type}; allowed are {', '.join(_OUTPUT_TYPES)}.")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task '{name}'{place}: runs generated programs, and would run them unprotected. "
            "Define it with kind: program, or choose another task."
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task '{name}'{place}: needs images or sound; only text is supported. Choose another task.")
    directions = task.higher_is_better()
    chosen = metric or next(iter(directions), None)
    if chosen is None:
        raise UserError(f"task '{name}'{place}: has no metric. Give it a metric_list.")
    if chosen not in directions:
        raise UserError(f"task '{name}'{place}: has no metric '{chosen}', but {', '.join(directions)}.{did_you_mean(chosen, directions)}")
    if not directions[chosen]:
        raise UserError(
            f"task '{name}'{place}: lower is better for its metric '{chosen}'. Choose another as TASK:METRIC, larger must be better."
        )
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    rules = [task.config.filter_list, task.config.metric_list, task.config.process_results]
    marking = [_VERSION, lm_eval.__version__, output_type, chosen, *map(_plain, rules)]
    for number, instances in enumerate(by_document.values()):
        instances.sort(key=lambda instance: instance.idx)
        requests = tuple(_request(instance, f"task '{name}'{place}") for instance in instances)
        document = _plain(instances[0].doc)
        key = _digest([marking, document, _reference(task, instances[0].doc), [dataclasses.astuple(request) for request in requests]])
        golds = _golds(task, instances[0].doc, len(requests))
        lengths = _lengths(task, instances[0].doc, requests) if len(golds) == 1 and chosen in ("acc", "acc_norm") else None
        marker = HarnessMarker(task, tuple(instances), chosen, golds, lengths)
        item = Item(_digest([document])[:16], key, requests, marker)
        if number == 0:  # a metric that cannot be used is found before any model is asked
            item.mark([(0.0, False) if request.generation is None else "" for request in requests])
        yield item


def remember_answers(task: Any) -> None:
    """Right answers and choices of a document are rendered once; the harness compiles their templates anew for every mark."""
    for name in ("doc_to_target", "doc_to_choice"):
        setattr(task, name, _remembering(getattr(task, name)))


def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(function)
    def remembered(document: Any, *arguments: Any, **options: Any) -> Any:
        if arguments or options:
            return function(document, *arguments, **options)
        if id(document) not in known:
            known[id(document)] = document, function(document)  # with the document, so that its id is nobody else's
        answer = known[id(document)][1]
        return answer if isinstance(answer, str | int) else copy.copy(answer)

    return remembered


def _golds(task: Any, document: Any, requests: int) -> tuple[int, ...]:
    """Positions of the requests that ask for a right answer: what the loss is taken of. None where text is generated."""
    if task.config.output_type != "multiple_choice":
        return (0,) if task.config.output_type == "loglikelihood" else ()
    gold = task.doc_to_text(document) if getattr(task, "multiple_input", 0) else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    chosen = [
        choices.index(one) if isinstance(one, str) and one in choices else one for one in (gold if isinstance(gold, list) else [gold])
    ]
    return tuple(one for one in chosen if isinstance(one, int) and 0 <= one < min(requests, len(choices)))


def _lengths(task: Any, document: Any, requests: Sequence[Request]) -> tuple[int, ...] | None:
    """Characters of the choices, where the harness's own code marks a choice of one right answer among them; else None."""
    from lm_eval.api.task import ConfigurableTask

    own = type(task).process_results is not ConfigurableTask.process_results or callable(task.config.process_results)
    if (
        own
        or task.config.output_type != "multiple_choice"
        or task.multiple_input
        or task.multiple_target
        or not takes_first(task._filters[0])
    ):
        return None
    lengths = tuple(len(choice) for choice in task.doc_to_choice(document))
    return lengths if len(lengths) == len(requests) and all(lengths) else None


def _reference(task: Any, document: Any) -> Any:
    """What answers to one document are held against: the task file says where in the document it stands."""
    choices = task.doc_to_choice(document) if getattr(task.config, "doc_to_choice", None) is not None else None
    gold = task.doc_to_text(document) if getattr(task, "multiple_input", 0) else task.doc_to_target(document)
    return _plain([gold, choices])


def _request(instance: Any, where: str) -> Request:
    if instance.request_type == "loglikelihood":
        context, continuation = instance.args[:2]
        return Request(str(context), str(continuation))
    prompt, settings = instance.args[:2]
    if settings.get("do_sample") or (settings.get("do_sample") is None and settings.get("temperature", 0.0) > 0):
        raise UserError(
            f"{where}: asks for sampling; candidates are compared on greedy answers. Set do_sample: false in its generation_kwargs."
        )
    if (instance.repeats or 1) != 1:
        raise UserError(f"{where}: asks for {instance.repeats} repeats; greedy answers are all alike. Set repeats: 1.")
    until = settings.get("until") or []
    limit = next((settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if key in settings), _MAX_NEW_TOKENS)
    return Request(str(prompt), generation=Generation(tuple([until] if isinstance(until, str) else until), int(limit)))


def _plain(value: Any) -> Any:
    """JSON-ready, and the same in every process: functions stand for their name and the text of their file."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Sequence):
        return [_plain(child) for child in value]
    if not callable(value):
        return type(value).__qualname__
    try:
        text = Path(inspect.getfile(inspect.unwrap(value))).read_bytes()
    except (TypeError, OSError):  # built in
        text = b""
    return [getattr(value, "__qualname__", type(value).__qualname__), hashlib.sha256(text).hexdigest()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

"""Tree-structured Parzen estimators through Optuna, for spaces with choices and conditions. Needs the extra `optuna`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.errors import UserError
from modelglue.search.decode import Decoder
from modelglue.search.randomness import rng
from modelglue.search.searcher import Needs, Outcome, Proposal, told
from modelglue.search.space import Choice, Int, Params, Simplex


class TpeSearch:
    """Optuna's multivariate TPE sampler; `startup` trials are random. Asked for `batch` candidates at once, it spreads them out.

    The same seed and scores give the same search as long as Optuna's version stays.
    """

    needs = Needs(racing="incumbent")

    def __init__(
        self, decoder: Decoder, *, seed: int = 0, trials: int | None = None, startup: int = 10, start: Sequence[Params] = ()
    ) -> None:
        optuna = _optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is experimental there is held to by a test here
            sampler = optuna.samplers.TPESampler(
                seed=int(rng(seed, "tpe").integers(2**31)), multivariate=True, group=True, n_startup_trials=startup, constant_liar=True
            )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._decoder, self._trials, self._count = decoder, trials, 0
        self._start = [decoder.space.canonical(params) for params in start]
        for params in self._start:
            self._study.enqueue_trial(_flat(decoder, params))
        self._asked: list[Any] = []

    def ask(self, n: int) -> list[Proposal]:
        count = n if self._trials is None else min(n, self._trials - self._count)
        self._asked = [self._study.ask() for _ in range(count)]
        found = []
        for trial in self._asked:
            params = self._suggested(trial)
            tag = "init" if self._count < len(self._start) else "child"
            self._count += 1
            found.append(Proposal(self._decoder.candidate(params), params, tag=tag))
        return found

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        for trial, value in zip(self._asked, told(outcomes), strict=True):
            self._study.tell(trial, value)

    def done(self) -> bool:
        return self._trials is not None and self._count >= self._trials

    def report(self) -> Mapping[str, Any]:
        return {"trials": self._count}

    def _suggested(self, trial: Any) -> dict[str, Any]:
        raw: dict[str, Any] = {}
        for parameter in self._decoder.space.parameters:
            when = parameter.when
            if when is not None and raw.get(when.parameter) not in when.values:
                continue
            name = parameter.name
            if isinstance(parameter, Choice):
                raw[name] = (
                    parameter.values[trial.suggest_int(name, 0, len(parameter.values) - 1)]
                    if _ordered(parameter)
                    else (trial.suggest_categorical(name, parameter.values))
                )
            elif isinstance(parameter, Simplex):
                raw[name] = [trial.suggest_float(f"{name}[{number}]", 0.0, 1.0) for number in range(parameter.size)]
            elif isinstance(parameter, Int):
                raw[name] = trial.suggest_int(name, parameter.low, parameter.high)
            else:
                raw[name] = trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)
        return self._decoder.space.canonical(raw)


def _ordered(parameter: Choice) -> bool:
    """Optuna takes plain values as categories; others go by their place."""
    return not all(isinstance(value, str | int | float | bool) or value is None for value in parameter.values)


def _flat(decoder: Decoder, params: Params) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for parameter in decoder.space.parameters:
        value = params.get(parameter.name)
        if isinstance(parameter, Simplex) and value is not None:
            found |= {f"{parameter.name}[{number}]": share for number, share in enumerate(value)}
        elif value is not None:
            found[parameter.name] = parameter.values.index(value) if isinstance(parameter, Choice) and _ordered(parameter) else value
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(f'searching by TPE needs the extra "optuna": pip install "modelglue[optuna]" ({error}).') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

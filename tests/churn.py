"""A churn of requests on one engine: plays scenarios, judges every request against itself alone, counts what came up."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from churn_engine import ChurnEngine, Got, Played
from churn_judge import Verdict, judge
from churn_scenario import Ask, Scenario, Settings
from churn_tally import Tally

from nnsight_vllm.errors import AdmissionError

if TYPE_CHECKING:
    from typing import Self


MAX_KEPT = 200  # results of requests alone


class Churn:
    """An engine for scenarios. `check` raises `AssertionError` for the first thing that isn't as it must be."""

    def __init__(self, checkpoint: str, settings: Settings) -> None:
        self.tally = Tally()
        self.worst = 0.0
        self._checkpoint, self._settings = checkpoint, settings
        self._engine: ChurnEngine | None = None
        self._alone: dict[Ask, list[Got]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def check(self, scenario: Scenario) -> None:
        """Run it, run each request alone, and run it without graphs."""
        if self._engine is None:
            self._engine = ChurnEngine(self._checkpoint, self._settings)
        try:
            self._check(self._engine, scenario)
        except BaseException as error:  # whatever it left behind isn't the next scenario's
            if not (isinstance(error, AssertionError) and self._engine.recover()):
                self._close()
            raise

    def _close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _check(self, engine: ChurnEngine, scenario: Scenario) -> None:
        scenario = self._admitted(engine, scenario)
        if not scenario.arrivals:
            return
        played = engine.play(scenario)
        self._count(engine, scenario, played)
        for number, arrival in enumerate(scenario.arrivals):
            self._judge(engine, arrival.ask, played.got[number], not played.is_aborted[number], f"request {number}")
        for number, got in played.broken_off:
            self._judge(engine, scenario.arrivals[number].ask, got, False, f"request {number} until it was evicted")
        if scenario.is_mixed and not scenario.front:
            self.tally.note("plain bits", _compare_plain(scenario, played, engine.play(scenario.plain)))

    def _admitted(self, engine: ChurnEngine, scenario: Scenario) -> Scenario:
        """Without the requests that the front end refuses, which it may do to long prompts with graphs only."""
        taken = []
        for arrival in scenario.arrivals:
            try:
                engine.prepare(arrival.ask)
                taken.append(arrival)
            except AdmissionError:
                assert len(arrival.ask.prompt) > engine.settings.step, "refused, though it fits into a step"
                self.tally.note("refused")
        return replace(scenario, arrivals=tuple(taken))

    def _judge(self, engine: ChurnEngine, ask: Ask, samples: list[Got], is_whole: bool, name: str) -> None:
        margins = engine.prepare(ask).margins
        for number, (got, alone) in enumerate(zip(samples, self._by_itself(engine, ask), strict=True)):
            try:
                verdict = judge(ask, number, got, alone, margins, is_whole)
            except AssertionError as error:
                error.add_note(f"{name}, sample {number}: {ask!r}")
                raise
            self._note(verdict)
            self.tally.note("stops", is_whole and alone.is_stopped)

    def _note(self, verdict: Verdict) -> None:
        self.tally.note("ties", verdict.is_tie)
        self.tally.note("same bits", verdict.is_same_bits)
        self.worst = max(self.worst, verdict.difference)

    def _by_itself(self, engine: ChurnEngine, ask: Ask) -> list[Got]:
        if len(self._alone) > MAX_KEPT:
            self._alone.clear()
        if ask not in self._alone:
            self._alone[ask] = engine.alone(ask)
        return self._alone[ask]

    def _count(self, engine: ChurnEngine, scenario: Scenario, played: Played) -> None:
        note = self.tally.note
        note("scenarios")
        note("front", scenario.front)
        note("grouped", played.num_grouped > 0)
        note("aborts", sum(played.is_aborted))
        note("waited", sum(played.has_waited))
        for _, has_graph in played.preempted:
            note("evicted graphs" if has_graph else "evicted plain")
        for arrival, samples in zip(scenario.arrivals, played.got, strict=True):
            self._count_one(arrival.ask, samples, engine.prepare(arrival.ask).changes_rows)

    def _count_one(self, ask: Ask, samples: list[Got], changes_rows: bool) -> None:
        note = self.tally.note
        note("requests")
        note("graphs", ask.graph is not None)
        note("samples", ask.n > 1)
        note("sampled", ask.temperature > 0)
        for got in samples:
            note("hits", got.num_cached > 0)
            note("hits of edits", got.num_cached > 0 and changes_rows)
            note("cut", got.num_pieces > 1)
            note("cut graphs", got.num_pieces > 1 and ask.graph is not None)
            note("texts", got.stop_reason is not None)
            note("failures", got.failure is not None)


def _compare_plain(scenario: Scenario, mixed: Played, plain: Played) -> int:
    """Logits of requests without graphs, bit for bit, as long as the steps have the same rows. Returns how many were compared."""
    count = 0
    for step, other in zip(mixed.steps, plain.steps, strict=False):
        if step != other:
            break
        for number, sample, at, rows in step:
            ask = scenario.arrivals[number].ask
            token = at + rows - len(ask.prompt)
            if ask.graph is None and token >= 0:
                one, two = (played.got[number][sample].logits[token] for played in (mixed, plain))
                assert torch.equal(one, two), f"token {token} of request {number} isn't what it is without graphs"
                count += 1
    return count

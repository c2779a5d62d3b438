"""The whole run: train a cascade as spec'd - base pass, then select, train, keep or stop, advance, stage by stage.

The algorithm is :meth:`CascadeRun.train`; what surrounds it stands below it, what is said and written in
``training/messages.py`` and ``runtime/run_folder.py``.
"""

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade_fast.base.base_pass import BasePass, base_pass
from cascade_fast.base.hidden_store import HiddenStore
from cascade_fast.base.model import BaseModel, cache_folder
from cascade_fast.base.sequences import Sequences
from cascade_fast.base.shards import store_of_all
from cascade_fast.criteria import get_criterion
from cascade_fast.inputs import read_inputs
from cascade_fast.model.configuration import finished_run_config
from cascade_fast.planning.ledger import compute_ledger, matmul_rate, stage_work
from cascade_fast.planning.memory import MemoryPlan
from cascade_fast.planning.plan import plan_run
from cascade_fast.records import (
    BaseRecord,
    CascadeFinal,
    Memory,
    PlannedMemory,
    RunRecord,
    RunResults,
    SplitTokens,
    StageRecord,
    routed_by,
)
from cascade_fast.reporting.heat_map import heat_map, write_heat_map
from cascade_fast.reporting.report import write_report
from cascade_fast.runtime.compute import Compute, peak_rss_bytes, release_memory
from cascade_fast.runtime.console import Progress, format_count, say, working
from cascade_fast.runtime.files import DamagedFile, write_json
from cascade_fast.runtime.machine import describe_machine, package_versions
from cascade_fast.runtime.metrics_log import MetricsLog
from cascade_fast.runtime.processes import by_first, processes
from cascade_fast.runtime.run_folder import RunFolder, write_results
from cascade_fast.runtime.trackers import Trackers, check_trackers
from cascade_fast.selection import EVERY_TOKEN, select_below, threshold_text
from cascade_fast.settings import GENERAL, SPLITS, RunSettings
from cascade_fast.stages.exits import (
    TOKENS_AT_ONCE,
    ExitEvaluation,
    ExitStage,
    advance,
    evaluate_exits,
    hardest_of_store,
)
from cascade_fast.stages.kind import StageKind, base_needs, get_kind
from cascade_fast.stages.outcome import measure_outcome
from cascade_fast.stages.stage import Stage
from cascade_fast.stages.tokens import Recompute, StageTokens
from cascade_fast.training.graphs import check_graphs
from cascade_fast.training.messages import say_base_pass, say_stage, say_start, say_summary
from cascade_fast.training.prompt_samples import PromptSamples
from cascade_fast.training.sharding import check_sharding
from cascade_fast.training.stage_trainer import StageTrainer
from cascade_fast.training.trainer import NON_FINITE_LOSS, TIME_IS_UP, NonFiniteLoss, TrainingHistory

EXIT_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the tokens that arrive; tried on validation


@dataclass
class CascadeRun:
    """A run under way. ``stages`` are those kept so far."""

    settings: RunSettings
    folder: RunFolder
    base: BaseModel
    base_pass: BasePass
    compute: Compute
    log: MetricsLog
    deadline: float | None
    micro_batch_tokens: int | None = None  # of the memory plan
    chats: bool = False  # whether the texts are conversations
    stages: list[ExitStage] = field(default_factory=list)
    records: list[StageRecord] = field(default_factory=list)  # of each stage trained, kept or not
    evaluation: ExitEvaluation | None = None  # of the stages kept, on validation; None: not known yet

    def train(self) -> None:
        """Steps 3 to 6 of the algorithm, for each stage."""
        settings = self.settings
        stores = self.base_pass.stores
        stores["val"] = self._near(stores["val"])  # read after every stage
        # What the base and each stage so far have left. Tokens on their way are in the last store; those that attend
        # read all of them.
        train, val = [self._near(stores["train"])], [stores["val"]]
        for number in range(1, settings.num_stages + 1):
            selection = hardest_of_store(train[-1], settings.hard_ratio)
            # Easy tokens that go through the stage in training enter it ever after.
            threshold = EVERY_TOKEN if settings.easy_tokens == "forward" else selection.threshold
            hard = self._tokens(train, selection.index_K)
            hard_val_index_K = self._hard_validation_index(val[-1], threshold)
            if len(hard_val_index_K) == 0:
                say(f"stage {number}: no validation token is hard at threshold {threshold:.4f}; stopping here")
                break
            hard_val = self._tokens(val, hard_val_index_K)
            record = self._stage(number, threshold, hard, hard_val)
            if not record.accepted or record.stopped in (TIME_IS_UP, NON_FINITE_LOSS):
                break
            if number < settings.num_stages:
                if not self.kind.attends:  # nobody reads the stores before these
                    train, val = [], []
                train = [*train, self._near(self._advance(number, hard, "train"))]
                val = [*val, self._near(self._advance(number, hard_val, "val"))]

    def _tokens(self, stores: list[HiddenStore], index_K: Tensor) -> StageTokens:
        return self.kind.tokens(stores, index_K, self.recompute, easy_too=self.settings.easy_tokens == "forward")

    def _near(self, store: HiddenStore) -> HiddenStore:
        """``store`` where stages read it: see ``--store``, which the plan has settled beside a GPU."""
        return store.to(self.compute.device) if self.settings.store == "device" else store

    def _hard_validation_index(self, val: HiddenStore, threshold: float) -> Tensor:
        """By the training threshold, as inference must; or, as the seed did, by validation's own quantile."""
        if self.settings.val_selection == "quantile" and threshold != EVERY_TOKEN:
            return hardest_of_store(val, self.settings.hard_ratio).index_K
        return select_below(val["score"], threshold)

    def _new_stage(self, number: int) -> Stage:
        before = self.stages[-1].stage if self.stages else None
        return self.kind.new(self.settings, self.base.config, self.base_pass, before, number)

    @functools.cached_property
    def kind(self) -> StageKind:
        return get_kind(self.settings.stage_kind)

    @functools.cached_property
    def samples(self) -> PromptSamples:
        return PromptSamples(self.settings, self.base, self.compute, self.log, self.folder.path, self.chats)

    @functools.cached_property
    def recompute(self) -> Recompute | None:
        return self.kind.recompute(self.settings, self.base.config, self.base_pass, self.compute)

    def _stage(self, number: int, threshold: float, hard: StageTokens, hard_val: StageTokens) -> StageRecord:
        """Trains stage ``number``, keeps it if it is worth it, and leaves its record; or finds all that done."""
        done = self._done(number)
        if done is not None:
            return done
        self.samples.before()
        stage = self._new_stage(number)
        n, total = len(hard), len(hard.store.labelled_index())
        say(
            f"stage {number}/{self.settings.num_stages}: threshold {threshold_text(threshold)}, "
            f"training hard tokens {n:,} / {total:,} ({n / total:.1%}), validation hard tokens {len(hard_val):,}, "
            f"added parameters {format_count(stage.parameter_count())}"
        )
        try:
            training = self._train_stage(stage, number, hard, hard_val)
        except DamagedFile as error:  # the best weights so far, damaged while training went on
            say(f"stage {number}: {error}; trained anew")
            self.folder.forget_stages(number, with_training=True)
            stage = self._new_stage(number)
            training = self._train_stage(stage, number, hard, hard_val)
        trained, evaluation = ExitStage(stage.eval(), threshold), None
        if training.best_epoch:
            trained, evaluation = self._choose_exit(trained, hard.store)
        accepted, verdict = self._judge(training, evaluation)
        record = StageRecord(
            stage=number,
            threshold=threshold,
            exit_threshold=trained.threshold,
            train_hard=n,
            train_total=total,
            val_hard=len(hard_val),
            added_parameters=stage.parameter_count(),
            trainable_parameters=sum(p.numel() for p in stage.parameters() if p.requires_grad),
            epochs=training.epochs,
            best_epoch=training.best_epoch,
            best_val_ppl=training.best_val_ppl if training.best_epoch else None,
            seconds=sum(epoch.seconds for epoch in training.epochs),
            compute=stage_work(self.settings, self.base.config, training.epochs, matmul_rate(self.compute)),
            accepted=accepted,
            verdict=verdict,
            stopped=training.stopped,
            all_token_val_ppl=evaluation.perplexity if evaluation else None,
            exit_share=evaluation.shares(len(self.stages) + 1) if evaluation else {},
        )
        if accepted:
            self.stages.append(trained)
            self.evaluation = evaluation
            by_first(trained.save)(self.folder.stage(number))
        self.records.append(record)
        self.log.write("stage", **{k: v for k, v in record.to_dict().items() if k != "epochs"})
        self.folder.write_stage_record(number, record, self.log.size())
        if not self.kind.attends:  # tokens that attend read what every exit before them has left
            self.folder.drop_hidden(number - 2)
        say_stage(record)
        if accepted:
            self.samples.after(self.stages)
            self.folder.write_stage_record(number, record, self.log.size())  # the log has the samples now, too
        return record

    def _done(self, number: int) -> StageRecord | None:
        """The record of stage ``number`` where its training is over and what it left is whole; its weights are loaded.

        Where something is damaged the stage is trained anew, to the same bits.
        """
        try:
            done = self.folder.stage_record(number)
            if done is not None and done.accepted:
                folder, shape = self.folder.stage(number), self.kind.config(self.settings, self.base.config)
                kept = ExitStage.load(folder, shape, done.exit_threshold, self.base_pass.head_VD)
                kept.stage.to(self.compute.device)
                self.kind.lend(kept.stage, self.base_pass)
                self.stages.append(kept)
                self.evaluation = None
        except DamagedFile as error:
            say(f"stage {number}: {error}; trained anew")
            done = None
            self.folder.forget_stages(number, with_training=True)
        if done is None:
            self.folder.forget_stages(number, with_training=False)
        else:
            self.records.append(done)
        return done

    def _train_stage(self, stage: Stage, number: int, hard: StageTokens, hard_val: StageTokens) -> TrainingHistory:
        trainer = StageTrainer(
            stage,
            hard,
            hard_val,
            self.settings,
            number=number,
            folder=self.folder.training(number),
            compute=self.compute,
            log=self.log,
            log_size=self.folder.metrics_before(number),
            deadline=self.deadline,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        for earlier in self.stages:  # they wait in the host's memory
            earlier.stage.layers.to("cpu")
        training = trainer.run()
        del trainer
        release_memory()  # of gradients and optimizer state, before evaluation
        for earlier in self.stages:
            earlier.stage.layers.to(self.compute.device)
        return training

    def _choose_exit(self, trained: ExitStage, arrived: HiddenStore) -> tuple[ExitStage, ExitEvaluation]:
        """The stage with the exit threshold it was trained at, or with the best of those that let in more tokens, and
        what comes of it. ``arrived``: the training tokens that come to it."""
        tried = [trained]
        if self.settings.exit_threshold == "validation" and trained.threshold != EVERY_TOKEN:
            wider = [share for share in EXIT_SHARES if share > self.settings.hard_ratio]
            tried += [ExitStage(trained.stage, hardest_of_store(arrived, share).threshold) for share in wider]
        evaluations = []
        for stage in tried:
            evaluations.append(self._all_tokens("val", [*self.stages, stage]))
            release_memory()  # other thresholds, other sizes: what has been freed would not fit
        best = min(range(len(tried)), key=lambda i: evaluations[i].perplexity)
        return tried[best], evaluations[best]

    def _judge(self, training: TrainingHistory, evaluation: ExitEvaluation | None) -> tuple[bool, str]:
        """Whether the stage is kept, and the sentence that says why."""
        if evaluation is None:
            return False, f"rejected: no epoch ended with a finite loss ({training.stopped})"
        before, after = self.evaluated.perplexity, evaluation.perplexity
        change = f"all-token validation perplexity {before:.4f} -> {after:.4f} ({after / before - 1:+.2%})"
        if self.settings.accept == "always":
            return True, f"kept, as the preset keeps every stage: {change}"
        margin = self.settings.min_improvement
        if after < before * (1 - margin):
            return True, f"kept: {change}"
        return (
            False,
            f"rejected, the cascade ends before it: {change}, and {margin:.2%} less is asked (min_improvement)",
        )

    def _all_tokens(self, split: str, stages: list[ExitStage] | None = None) -> ExitEvaluation:
        """The cascade so far (or the one of ``stages``) over every token of a split, each at its own exit."""
        return evaluate_exits(
            self.stages if stages is None else stages,
            self.base_pass.stores[split],
            recompute=self.recompute,
            **self._how,
        )

    def _advance(self, number: int, hard: StageTokens, split: str) -> HiddenStore:
        """The hard tokens after stage ``number``: the store of the next stage. Order, positions, labels are kept."""
        source, parts = hard.store, hard.chunks(TOKENS_AT_ONCE)
        rows, dtype = [hard.count(picked) for picked in parts], source.handed_on_dtype
        how: dict[str, Any] = {"with_loss": True, "kv_shape": self.stages[-1].stage.config.kv_shape}

        def create(folder: Path, rows: int, meta: dict[str, Any]) -> HiddenStore:
            return HiddenStore.create(folder, rows, source.hidden.shape[1], dtype, meta=meta, **how)

        def fill(store: HiddenStore, part: slice) -> None:
            with Progress(f"{split} tokens through stage {number}", sum(rows[part])) as progress:
                for picked in parts[part]:
                    store.append(advance(self.stages[-1].stage, hard, picked, **self._how))
                    progress.advance(hard.count(picked))

        meta = {**source.meta, "stage": number, "split": split}
        return store_of_all(self.folder.hidden(number, split), rows, meta, create, fill)

    # --- results -----------------------------------------------------------------------------------------------------

    @property
    def evaluated(self) -> ExitEvaluation:
        """Of the stages kept so far, on validation."""
        if self.evaluation is None:
            self.evaluation = self._all_tokens("val")
        return self.evaluation

    def heat_map(self, val: Sequences, tokenizer: Any) -> dict[str, Any]:
        """``heat_map.json``, of the validation sequences."""
        return heat_map(
            tokenizer,
            val,
            self.evaluated,
            criterion=routed_by(self.settings),
            thresholds=[stage.threshold for stage in self.stages],
        )

    def results(self, started: float, plan: MemoryPlan) -> RunResults:
        """What came of the run: reads the test split and other text, for the only time."""
        final, passed = self.evaluated, self.base_pass
        tokens = SplitTokens(**{split: len(passed.stores[split].labelled_index()) for split in SPLITS})
        evaluated = {"val": final}
        evaluated |= {s: self._all_tokens(s) for s in ("test", GENERAL) if len(passed.stores.get(s, ()))}
        how: dict[str, Any] = {"compute": self.compute, "recompute": self.recompute}
        general, merged = measure_outcome(self.settings, self.stages, passed.stores, evaluated, self.base.layers, **how)
        return RunResults(
            base=BaseRecord(
                name=self.base.name,
                source=self.base.source,
                parameters=passed.parameters,
                layers=self.base.layers,
                val_ppl=self._all_tokens("val", []).perplexity,
            ),
            tokens=tokens,
            settings=self.settings.to_dict(),
            stages=self.records,
            final=CascadeFinal(
                all_token_val_ppl=final.perplexity,
                all_token_test_ppl=evaluated["test"].perplexity if tokens.test else None,
                base_test_ppl=self._all_tokens("test", []).perplexity if tokens.test else None,
                exit_share=final.shares(len(self.stages)),
                stages_kept=len(self.stages),
                stages_asked=self.settings.num_stages,
                total_parameters=passed.parameters + sum(s.stage.parameter_count() for s in self.stages),
                base_pass_seconds=passed.seconds,
                base_pass_reused=passed.reused,
                seconds=time.monotonic() - started,
                peak_rss_bytes=peak_rss_bytes(),
                general=general,
                merged=merged,
            ),
            compute=compute_ledger(
                self.settings,
                self.base.config,
                tokens=tokens,
                base_pass_seconds=passed.seconds,
                stages=self.records,
                rate=matmul_rate(self.compute),
                general=len(passed.stores.get(GENERAL, ())),
            ),
            memory=Memory(
                planned=PlannedMemory(**plan.to_dict()), measured_peak_bytes=self.compute.peak_memory_bytes()
            ),
        )

    @property
    def _how(self) -> dict[str, Any]:
        return {"criterion": get_criterion(routed_by(self.settings)), "compute": self.compute}


def run_cascade(settings: RunSettings) -> RunFolder:
    """Trains a cascade and writes everything about it into its folder; the whole of ``python -m cascade_fast.train``.

    Raises:
        InputError: a setting that cannot work, before anything is trained or written.
        Interrupted: Ctrl-C or SIGTERM; ``resume`` goes on from there.
        NonFiniteScores: hidden states overflowed; names sequence and position.
        NonFiniteLoss: training diverged; results and report of what was good are written first.
    """
    started = time.monotonic()
    deadline = None if settings.max_minutes is None else started + 60 * settings.max_minutes
    these, compute = processes(), Compute.choose(settings.device, settings.dtype)
    check_trackers(settings.report_to)
    check_sharding(settings, these)
    inputs = read_inputs(settings, compute)
    settings, base, sequences = inputs.settings, inputs.base, inputs.sequences
    record = RunRecord(
        settings=settings.to_dict(),
        fingerprints={"base": base.fingerprint, "data": sequences.fingerprint()},
        versions=package_versions(),
        machine=describe_machine(compute),
    )
    folder = RunFolder.find(settings, record)
    plan = None if folder.finished else plan_run(settings, base, sequences, compute, folder.path, folder.record.kv)
    if plan is not None:
        check_graphs(settings, compute, plan.memory.micro_batch_tokens)
        plan = plan.of_first(these)
    with folder.open(kv=folder.record.kv if plan is None else plan.settings.kv):
        if plan is None or folder.finished:
            folder.check()
            folder.clean()
            say(f"finished already: {folder.report}")
            return folder
        settings, log = plan.settings, folder.log
        if these.first:
            log.trackers = Trackers.start(settings.report_to, folder.path, settings.to_dict(), log.records())
        say_start(settings, folder, base, sequences, compute)
        for line in plan.lines():
            say(line)
        passed = base_pass(base, sequences, settings, base_needs(settings), compute, cache_folder(settings))
        say_base_pass(passed)
        passed = passed.to(compute.device, layers=settings.adapter != "none")  # once, for all stages
        micro, chats = plan.memory.micro_batch_tokens, sequences.chats
        run = CascadeRun(settings, folder, base, passed, compute, log, deadline, micro, chats)
        run.train()
        with working("measuring validation and test, and writing the report"):
            results, tokens = run.results(started, plan.memory), run.heat_map(sequences.splits["val"], inputs.tokenizer)
            if these.first:
                write_json(folder.config, finished_run_config(folder.record, results, base, run.stages))
                write_heat_map(folder.path, tokens)
                write_results(folder.path, results)
                write_report(folder.path)
        log.write("end", **results.final.to_dict(), base_val_ppl=results.base.val_ppl)
        folder.clean()
        say_summary(results, folder)
        if results.stages and results.stages[-1].stopped == NON_FINITE_LOSS:
            raise NonFiniteLoss(len(results.stages), folder.path, compute.dtype)
        return folder

"""Records with numbers that mean nothing, for tests that change the few they are about."""

from cascade_fast.records import BaseRecord, CascadeFinal, Epoch, RunResults, SplitTokens, StageRecord


def epoch(**changes) -> Epoch:
    numbers = {"epoch": 1, "tokens": 10, "train_loss": 1.0, "val_loss": 1.0, "val_ppl": 2.7, "seconds": 1.0}
    return Epoch(**{**numbers, "tokens_per_second": 10.0, "skipped_steps": 0, **changes})


def stage(**changes) -> StageRecord:
    default = {
        "stage": 1, "threshold": 0.1, "exit_threshold": 0.1, "train_hard": 6, "train_total": 10, "val_hard": 3,
        "added_parameters": 5, "trainable_parameters": 5, "epochs": [epoch()], "best_epoch": 1, "best_val_ppl": 2.7,
        "seconds": 1.0, "accepted": True, "verdict": "kept", "stopped": "all epochs done", "all_token_val_ppl": 7.0,
        "exit_share": {"base": 0.4, "stage_1": 0.6},
    }  # fmt: skip
    return StageRecord(**{**default, **changes})


def results(stages: list[StageRecord], kept: int, settings: dict, **base) -> RunResults:
    numbers = {"name": "base", "source": "nowhere", "parameters": 100, "layers": 30, "val_ppl": 8.0}
    return RunResults(
        base=BaseRecord(**{**numbers, **base}),
        tokens=SplitTokens(train=10, val=5, test=0),
        settings=settings,
        stages=stages,
        final=CascadeFinal(
            all_token_val_ppl=7.0, all_token_test_ppl=None, base_test_ppl=None, base_pass_seconds=1.0,
            base_pass_reused=False, seconds=9.0, peak_rss_bytes=1, exit_share={"base": 1.0}, stages_kept=kept,
            stages_asked=2, total_parameters=110,
        ),
    )  # fmt: skip

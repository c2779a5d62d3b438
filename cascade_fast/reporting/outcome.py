"""Tables of what is measured at the end of a run: the merged model beside the cascade, and other text."""

from cascade_fast.criteria import model_criteria
from cascade_fast.records import Final, General, RunResults, routed_by

Table = tuple[list[str], list[list[str]]]  # header and rows


def merged_table(results: RunResults) -> Table | None:
    """The cascade and the plain model that it can be merged into; None where there is none."""
    merged, final = results.final.merged, results.final
    if merged is None:
        return None
    measured = [
        ("cascade", final.all_token_val_ppl, final.all_token_test_ppl, results.layers_per_token),
        ("merged", merged.all_token_val_ppl, merged.all_token_test_ppl, merged.layers_per_token),
    ]
    rows = [
        [name, f"{val:.4f}", "-" if test is None else f"{test:.4f}", f"{layers:.2f}"]
        for name, val, test, layers in measured
    ]
    return ["all-token perplexity", "validation", "test", "layers a token"], rows


def merge_advice(results: RunResults, run: str) -> str | None:
    """A sentence and the command that merges ``run``, where that is the better choice. None where the run does not load
    as a model, or its base is in 4 bit: the stage goes with those weights, not with the 16-bit ones it would be merged
    into."""
    settings = results.settings
    loads = routed_by(settings) in model_criteria() and settings.get("base_quantization", "none") == "none"
    if not results.better_merged or not loads:
        return None
    return (
        "Merged into a plain model it is at least as good on validation, with fewer layers a token: "
        f"`python -m cascade_fast.export {run} --to FOLDER --format merged`"
    )


def general_title(general: General) -> str:
    return f"other text, {general.tokens:,} tokens of {general.dataset}"


def general_table(final: Final, trained: str = "cascade") -> Table | None:
    """Loss on other text in nats, of the base and of what was trained on top of it; None where none was read."""
    general = final.general
    if general is None:
        return None
    rises = [(trained, general.rise), ("merged", general.merged_rise)]
    rows = [["base", f"{general.base_loss:.4f}", ""]]
    rows += [[name, f"{general.base_loss + rise:.4f}", f"{rise:+.4f}"] for name, rise in rises if rise is not None]
    return ["", "loss, nats", "rise"], rows

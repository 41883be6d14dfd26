"""Every animal of the zoo, with the trial that must catch it."""

from __future__ import annotations

from dataclasses import dataclass

from backend_zoo import claims, company, effects, hooks, layouts, results
from backend_zoo.works_at_import import WorksAtImport
from inference_shardformer.attention.base import AttentionBackend

# Whatever looks at results sees that they are wrong.
RESULTS = frozenset(
    {
        "named_batches",
        "gqa_ratios",
        "head_dims",
        "block_sizes",
        "sliding_window",
        "softcap",
        "sinks",
        "declared_combinations",
        "one_plan_serves_every_layer",
        "takes_views",
        "works_in_and_out_of_inference_mode",
        "alone_equals_in_company",
        "nan_spoils_no_other_sequence",
        "steps_do_not_meet",
        "instances_do_not_meet",
    }
)
# Where what a sequence owns is not what is read, stale slots show.
HOLES = frozenset({"ignores_stale_slots", "large_scores"})
STEPS_TWICE = frozenset(
    {"one_plan_serves_every_layer", "works_in_and_out_of_inference_mode", "alone_equals_in_company"}
)


@dataclass(frozen=True)
class Specimen:
    """A broken backend. `caught_by` is the intended trial, `check[id]`, or a check.

    `also` are the only other checks that may fail with it, for the same reason; `spared` is a trial of the same check
    that must pass, so that the intended one fails for the intended reason.
    """

    backend: type[AttentionBackend]
    caught_by: str
    also: frozenset[str] = frozenset()
    spared: str = ""

    @property
    def check(self) -> str:
        return self.caught_by.partition("[")[0]


def _alone(backend: type[AttentionBackend], caught_by: str, spared: str = "") -> Specimen:
    return Specimen(backend, caught_by, frozenset(), spared)


def _wrong(backend: type[AttentionBackend], caught_by: str, spared: str = "") -> Specimen:
    return Specimen(backend, caught_by, RESULTS, spared)


def _only_with(backend: type[AttentionBackend], caught_by: str, spared: str = "") -> Specimen:
    return Specimen(backend, caught_by, frozenset({"declared_combinations"}), spared)


DECLARES = "declares_its_contract[version_name_capabilities]"
MEMORY = "memory_stays_flat[cpu-24_steps]"
GRAPHS = "graphs[cpu-one_plan_many_batches]"
DECODE = "named_batches[cpu-float32-single_decode]"

SPECIMENS = (
    # masks and scores
    _wrong(results.SeesTheNext, "named_batches[cpu-float32-single_prompt]", DECODE),
    _wrong(results.NotCausal, "named_batches[cpu-float32-ragged_prompts]", DECODE),
    _wrong(results.MissesItself, DECODE, "named_batches[cpu-float32-one_token_prompt]"),
    _wrong(
        results.NoBlockTable,
        "named_batches[cpu-float32-block_boundaries]",
        "named_batches[cpu-float32-one_token_prompt]",
    ),
    _wrong(
        results.InterleavedHeads,
        "gqa_ratios[cpu-4_heads_per_kv_head]",
        "gqa_ratios[cpu-1_heads_per_kv_head]",
    ),
    _wrong(results.UsualScale, DECODE, "named_batches[cpu-float32-one_token_prompt]"),
    _only_with(results.NoWindow, "sliding_window[cpu-float32-window_8]", "sliding_window[cpu-float32-window_1000]"),
    _only_with(results.WideWindow, "sliding_window[cpu-float32-window_1]", "sliding_window[cpu-float32-window_1000]"),
    _only_with(results.NoSoftcap, "softcap[cpu-bfloat16-softcap_0.5]", "softcap[cpu-bfloat16-softcap_50]"),
    _only_with(results.CapsBeforeScaling, "softcap[cpu-float32-softcap_2]"),
    _only_with(results.NoSinks, "sinks[cpu-float32-sinks]"),
    _alone(results.PlainExp, "large_scores[cpu-float32]"),
    # what comes out
    _wrong(results.AlwaysDouble, DECODE),
    _wrong(results.UpcastsSilently, "named_batches[cpu-bfloat16-mixed]", "named_batches[cpu-float32-mixed]"),
    _wrong(results.DowncastsSilently, "named_batches[cpu-float32-mixed]", "named_batches[cpu-bfloat16-mixed]"),
    _wrong(results.HeadsFirst, DECODE),
    _wrong(results.Flat, DECODE),
    # what is declared
    Specimen(
        claims.ClaimsFloat16,
        "named_batches[cpu-float16-mixed]",
        RESULTS | {"large_scores", "ignores_stale_slots", "attend_changes_nothing", "deterministic"},
        "named_batches[cpu-float32-mixed]",
    ),
    _wrong(claims.ClaimsHeadDim64, "head_dims[cpu-head_dim_64]", "head_dims[cpu-head_dim_32]"),
    _wrong(
        claims.OneBlockSize,
        "block_sizes[cpu-block_size_4-ragged_decodes]",
        "block_sizes[cpu-block_size_16-ragged_decodes]",
    ),
    _alone(claims.NoSuchPair, "declared_combinations"),
    _alone(claims.RefusesHeadDim32, "accepts_what_it_declares[head_dim_32]", "accepts_what_it_declares[head_dim_16]"),
    _alone(claims.RefusesNothing, "refuses_what_it_does_not_declare[dtype_float16]"),
    _alone(claims.ChangesItsMind, "reasons_are_stable[twice]"),
    _alone(claims.ClaimsKeysInBfloat16, "kv_dtypes[cpu-float32-keys_in_bfloat16]"),
    _alone(
        claims.SecretSinks,
        "hooks_of_absent_features_refuse[cpu-attend_with_sinks]",
        "hooks_of_absent_features_refuse[cpu-plan_capture]",
    ),
    _alone(claims.FromTheFuture, DECLARES),
    _alone(claims.WithoutVersion, DECLARES),
    _alone(claims.WithoutFacts, DECLARES),
    _alone(claims.OtherSpec, "keeps_its_spec[cpu-spec]"),
    # what is changed
    Specimen(effects.WritesPastTheSlot, "writes_only_the_named_slots[cpu-float32]", RESULTS),
    Specimen(layouts.HndInNameOnly, "writes_only_the_named_slots[cpu-float32]", RESULTS | HOLES),
    Specimen(effects.SwapsKeysAndValues, "writes_only_the_named_slots[cpu-float32]", RESULTS),
    Specimen(effects.WritesLate, "writes_only_the_named_slots[cpu-float32]", frozenset({"attend_changes_nothing"})),
    Specimen(effects.ReadsTheTail, "ignores_stale_slots[cpu-float32]", frozenset({"nan_spoils_no_other_sequence"})),
    Specimen(effects.ScalesQueriesInPlace, "attend_changes_nothing[cpu-float32]", STEPS_TWICE),
    Specimen(effects.ScalesKeysInPlace, "write_keeps_its_inputs[cpu-float32]", STEPS_TWICE),
    _alone(effects.RewritesTheBlockTable, "plan_changes_nothing[cpu-float32]"),
    _alone(effects.PlanClearsTheCache, "plan_changes_nothing[cpu-float32]"),
    _alone(effects.ContiguousOnly, "takes_views[cpu-float32]"),
    _alone(effects.CountsInThePlan, "works_in_and_out_of_inference_mode[cpu-float32]"),
    _alone(effects.SeedsTorch, "leaves_global_state_alone[cpu-build_plan_write_attend]"),
    _alone(effects.SetsVariables, "leaves_global_state_alone[cpu-build_plan_write_attend]"),
    _alone(WorksAtImport, "import_does_no_work[in_a_new_process]"),
    # whom it meets
    Specimen(company.PadsToTheLongest, "alone_equals_in_company[cpu-float32]", RESULTS),
    _alone(company.SpreadsNaN, "nan_spoils_no_other_sequence[cpu-float32]"),
    Specimen(
        company.Jitters, "deterministic[cpu-float32]", frozenset({"ignores_stale_slots"}), "deterministic[cpu-bfloat16]"
    ),
    _alone(company.PlansOnce, "steps_do_not_meet[cpu-float32]"),
    _alone(company.SharesOneSpec, "instances_do_not_meet[cpu-two_at_once]"),
    _alone(company.RemembersTheFirstLayer, "one_plan_serves_every_layer[cpu-float32]"),
    _alone(company.KeepsOutputs, MEMORY),
    _alone(company.KeepsPlans, MEMORY),
    _alone(company.KeepsHostBuffers, MEMORY),
    _alone(hooks.ForgetsToRefill, GRAPHS),
    _alone(hooks.MovesTheTables, GRAPHS),
)

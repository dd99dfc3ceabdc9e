"""The checklist of PPO's known mistakes: every point has tests, and they are there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
MATHEMATICS, OBJECTIVES, CHECKLIST, LAYOUTS, BUGS, REFIT, STREAMING = (
    f"alignment/ppo/test_{name}.py"
    for name in ("mathematics", "objectives", "checklist", "layouts", "injected_bugs", "refit", "streaming")
)
STOPS = (CHECKLIST, "test_02_20_22_23_stops_values_frozen_models_and_optimizers")
SETTINGS = (CHECKLIST, "test_05_06_09_temperature_entropy_adaptive_penalty_and_early_stop_reach_the_models")
ROWS = (MATHEMATICS, "test_03_rows_lie_where_the_model_reads_the_token_before")
SAME = (LAYOUTS, "test_every_layout_learns_what_one_rank_learns")
CUTS = (BUGS, "test_16_and_21_updates_do_not_depend_on_micro_batches_and_replicas")
POINTS: dict[int, tuple[tuple[str, str], ...]] = {
    1: (
        (MATHEMATICS, "test_01_the_mask_ends_with_the_first_end_and_pad_is_no_end"),
        ("model/generation/test_engine.py", "test_excluded_tokens_are_never_drawn_and_have_no_probability"),
    ),
    2: (STOPS, ("model/generation/test_engine.py", "test_rows_end_at_every_stop_token")),
    3: (
        ROWS,
        (
            "alignment/test_log_probabilities.py",
            "test_equal_transformers_and_do_not_depend_on_padding_batch_or_packing",
        ),
    ),
    4: (
        ("model/generation/test_engine.py", "test_log_probabilities_equal_transformers"),
        ("model/generation/test_engine.py", "test_a_row_does_not_depend_on_others"),
    ),
    5: (SAME, SETTINGS),
    6: (
        SETTINGS,
        (OBJECTIVES, "test_06_log_probabilities_have_the_temperature_and_values_and_scores_lie_where_they_are_read"),
        (MATHEMATICS, "test_06_entropy_and_its_gradient_are_those_of_the_softmax"),
    ),
    7: ((MATHEMATICS, "test_07_filters_that_change_the_distribution_are_refused"),),
    8: (("model/generation/test_sampling.py", "test_tokens_follow_the_softmax"),),
    9: (
        (MATHEMATICS, "test_09_the_penalty_is_k1_of_every_token_and_lowers_the_reward_where_the_policy_is_likelier"),
        (OBJECTIVES, "test_09_at_staleness_1_the_penalty_is_of_the_policy_that_sampled_and_tokens_are_weighed"),
    ),
    10: (SAME, (MATHEMATICS, "test_10_estimates_agree_with_the_enumerated_divergence")),
    11: (
        (MATHEMATICS, "test_11_the_score_is_at_the_last_valid_token_and_rewards_add_up"),
        (MATHEMATICS, "test_11_what_an_answer_is_paid_is_its_score_less_the_coefficient_times_k1"),
    ),
    12: ((MATHEMATICS, "test_12_the_penalty_for_a_missing_end_is_of_rows_without_one"),),
    13: (
        (MATHEMATICS, "test_13_advantages_are_those_of_the_definition_and_padding_is_poison"),
        (OBJECTIVES, "test_13_gamma_and_lambda_are_each_in_its_own_place"),
    ),
    14: ((MATHEMATICS, "test_14_at_lambda_and_gamma_1_the_advantage_is_return_less_value"),),
    15: (
        (MATHEMATICS, "test_15_whitening_is_over_the_tokens_of_the_whole_batch"),
        (OBJECTIVES, "test_13_gamma_and_lambda_are_each_in_its_own_place"),
    ),
    16: (CUTS, (OBJECTIVES, "test_06_16_the_policys_loss_and_gradient_are_those_of_the_formula")),
    17: ((MATHEMATICS, "test_17_gradients_vanish_where_the_ratio_is_clipped_on_the_side_that_gains"),),
    18: (
        (MATHEMATICS, "test_18_the_value_loss_takes_the_larger_error_around_the_old_value"),
        (OBJECTIVES, "test_18_the_critics_loss_and_gradient_are_those_of_the_formula"),
    ),
    19: (
        ("alignment/test_pairs.py", "test_losses_are_those_of_the_papers"),
        ("alignment/test_pairs.py", "test_scores_are_read_at_the_last_token"),
        (OBJECTIVES, "test_19_scores_are_on_the_scale_that_the_reward_model_stored"),
        ("launch/test_ppo.py", "test_a_reward_model_scores_and_the_critic_begins_with_its_weights"),
    ),
    20: (STOPS, SETTINGS, ("launch/test_ppo.py", "test_a_reward_model_scores_and_the_critic_begins_with_its_weights")),
    21: (CUTS, SAME),
    22: (STOPS,),
    23: (STOPS, SETTINGS),
    24: (
        (REFIT, "test_logits_are_the_actors_after_a_reshard_between_any_two_layouts"),
        (REFIT, "test_a_refit_that_is_left_out_ends_the_run"),
        (REFIT, "test_a_stale_cache_of_keys_and_values_ends_the_run"),
        (MATHEMATICS, "test_24_rows_of_other_weights_are_refused_each_by_its_version"),
    ),
    25: (
        ("launch/test_ppo.py", "test_resumes_exactly_and_generates_alike_with_roles_apart"),
        (STREAMING, "test_25_a_run_that_crashed_with_answers_under_way_goes_on_to_the_same_bits"),
    ),
}


@pytest.mark.parametrize("point", range(1, 26))
def test_every_point_has_a_test(point: int) -> None:
    for file, name in POINTS[point]:
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file

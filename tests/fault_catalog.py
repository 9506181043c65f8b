"""The catalogue of injected faults: which test injects what, and what is promised to happen.

`uv run pytest -m fault` runs them all, the slow ones too, and prints the catalogue with what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """
    Attributes:
        stage: where in the pipeline it strikes.
        what: the fault.
        expected: what must come of it; the test holds it to that.
    """

    stage: str
    what: str
    expected: str


_ASIDE, _NAMED, _SAME = "set aside with file, line, reason", "one error that names the file", "same result, bit by bit"
_WHOLE = "the old state or the new one, and the same command resumes"

FAULTS: dict[str, Fault] = {
    # --- raw data
    "test_corpus::test_a_bad_line_has_its_reason": Fault("read", "malformed lines", _ASIDE),
    "test_corpus::test_an_odd_line_becomes_an_item_that_arrow_takes": Fault("read", "odd values", "an item"),
    "test_corpus::test_a_bad_time_has_its_reason": Fault("read", "malformed times", _ASIDE),
    "test_corpus::test_a_bad_file_is_named": Fault("read", "damaged, cut, hostile files", _NAMED),
    "test_corpus::test_an_empty_file_has_no_lines_and_closes_with_an_error": Fault("read", "empty files", _NAMED),
    "test_datasets::test_a_truncated_or_damaged_gzip_file_is_named": Fault("read", "gzip cut anywhere", _NAMED),
    "test_datasets::test_bad_lines_are_counted_with_file_line_and_reason": Fault("read", "bad lines in a file", _ASIDE),
    "test_download::test_a_broken_transfer_is_taken_up_again": Fault("read", "broken download", "taken up again"),
    "test_download::test_an_unreachable_server": Fault("read", "no server", "one error after five attempts"),
    "test_download::test_a_file_that_changed_before_a_resume_is_read_again_and_never_mixed": Fault(
        "read", "changed on the server before a resume", "read again, never mixed"
    ),
    "test_download::test_without_a_version_a_file_is_only_resumed_at_once_and_at_its_size": Fault(
        "read", "changed on a server without versions", "read again, never mixed"
    ),
    "test_download::test_a_file_in_the_cache_is_asked_about_and_a_changed_one_downloaded_again": Fault(
        "read", "changed on the server after it was downloaded", "read again"
    ),
    "test_download::test_without_an_answer_the_file_in_the_cache_is_used": Fault(
        "read", "no network, 503, 404 with a file in the cache", "the file in the cache"
    ),
    "test_download::test_a_kill_between_a_file_and_its_version_costs_a_transfer_and_no_more": Fault(
        "read", "killed as a download ends", "read again"
    ),
    "test_download::test_processes_download_one_url_at_once": Fault("read", "three downloads at once", "one transfer"),
    "test_catalog::test_of_duplicate_items_the_most_complete_is_kept_in_any_order": Fault("read", "doubled items", _SAME),
    "test_catalog::test_the_result_does_not_depend_on_the_order_of_files_with_ties_by_id": Fault("read", "ties", _SAME),
    "test_catalog::test_nothing_left_after_the_k_core": Fault("read", "nobody has enough events", "an error with counts"),
    "test_catalog::test_unknown_items_are_counted_and_too_many_stop": Fault(
        "read", "histories of unknown items", "counted, an error above the limit"
    ),
    # --- configuration
    "test_corpus::test_a_bad_override_is_named": Fault("config", "impossible settings", "an error that names the key"),
    "test_corpus::test_a_bad_configuration_file_is_named": Fault("config", "damaged files", _NAMED),
    # --- embedding
    "test_corpus::test_bad_vectors_are_named": Fault("embed", "unusable vectors", "an error that names items"),
    "test_embedding::test_a_nan_stops_with_the_item_ids": Fault("embed", "NaN in a vector", "an error that names items"),
    "test_embedding::test_a_model_that_is_not_there_names_the_cure": Fault("embed", "no such encoder", "one error"),
    "test_scale::test_a_killed_actor_loses_and_doubles_nothing": Fault("embed", "actor killed", "nothing lost or doubled"),
    "test_scale::test_a_table_through_actors_restarts_where_it_stopped": Fault("embed", "stage killed", "resumes"),
    "test_scale::test_work_that_never_fits_is_refused": Fault("embed", "too few CPUs", "an error, no wait"),
    "test_scale::test_map_table_names_a_shard_that_kills_its_actor": Fault("embed", "a shard kills its actor", "named"),
    "test_nodes::test_a_node_lost_while_embedding_loses_and_doubles_nothing": Fault(
        "embed", "node killed", "nothing lost or doubled"
    ),
    # --- recommending
    "test_batch::test_a_killed_batch_continues_and_no_user_is_missing_or_doubled": Fault(
        "recommend", "actor and driver killed in the middle", "every user once, nothing made again"
    ),
    # --- training
    "test_nodes::test_a_node_lost_while_training_changes_nothing": Fault("train", "node killed", _SAME),
    "test_nodes::test_a_node_lost_while_preparing_changes_no_byte": Fault("prepare", "node killed", _SAME),
    "test_nodes::test_a_node_lost_while_tokenizing_changes_no_id": Fault("tokenize", "node killed", _SAME),
    "test_nodes::test_a_node_lost_while_evaluating_changes_no_figure": Fault("evaluate", "node killed", _SAME),
    "test_resume::test_three_worker_kills_and_a_driver_kill_change_nothing": Fault(
        "train", "3 workers and the driver killed", _SAME
    ),
    "test_scale::test_training_resumes_after_a_worker_was_killed": Fault("train", "worker killed", _SAME),
    "test_scale::test_tiger_error_on_any_rank_stops_training_within_seconds": Fault(
        "train", "an error on one rank", "ends within 10 s, as it was"
    ),
    "test_training::test_going_on_from_a_snapshot_changes_nothing": Fault("train", "stopped at a snapshot", _SAME),
    "test_process_groups::test_workers_that_come_apart_are_stopped": Fault("train", "1e-6 on one worker", "an error, by tensor"),
    "test_publish::test_a_snapshot_that_ends_anywhere_leaves_the_one_before_or_itself": Fault(
        "train", "killed, disk full, I/O error at every write of a snapshot", _WHOLE
    ),
    "test_publish::test_a_damaged_snapshot_is_passed_over_and_never_means_step_zero": Fault(
        "train", "damaged snapshot", "the one before, never step 0"
    ),
    "test_publish::test_a_snapshot_of_another_training_is_refused_by_field": Fault("train", "other settings", "refused"),
    "test_leaks::test_training_on_the_validation_item_is_refused": Fault("train", "leak of a target", "refused"),
    # --- tokenizer and semantic IDs
    "test_tokenizers::test_a_codebook_larger_than_the_catalog_is_refused": Fault("tokenizer", "too few items", "refused"),
    "test_tokenizers::test_a_row_that_is_not_finite_is_named": Fault("tokenizer", "NaN row", "an error that names items"),
    "test_tokenizers::test_identical_items_end_in_a_verdict_and_not_in_silence": Fault(
        "tokenizer", "identical texts", "a verdict"
    ),
    "test_tokenizers::test_an_exploding_learning_rate_stops_before_the_step": Fault(
        "tokenizer", "loss explodes", "an error before the step"
    ),
    "test_tokenizers::test_three_hundred_identical_items": Fault("ids", "300 identical items", "unique IDs"),
    "test_semantic_ids::test_a_group_that_outgrows_its_level_is_named": Fault("ids", "group too large", "an error"),
    "test_semantic_ids::test_doubled_or_impossible_ids_are_refused": Fault("ids", "doubled or impossible IDs", "refused"),
    "test_semantic_ids::test_ids_do_not_depend_on_how_the_codes_were_cut": Fault("ids", "other shards", _SAME),
    "test_diagnostics::test_a_collapse_stops_the_stage": Fault("all", "collapses", "an error with the likely cause"),
    "test_jobs::test_a_collapsed_stage_stops_the_pipeline_there": Fault("all", "identical texts", "stops at the stage"),
    # --- search for a tokenizer
    "test_sweeps::test_a_sweep_that_was_killed_resumes": Fault("sweep", "driver killed", "no finished trial runs again"),
    # --- artifacts and storage
    "test_publish::test_a_publish_that_ends_anywhere_is_there_or_not": Fault(
        "storage", "killed, disk full, I/O error at every write of a publish", _WHOLE
    ),
    "test_publish::test_every_byte_of_an_artifact_counts": Fault("storage", "a bit flipped in every byte", "refused"),
    "test_corpus::test_a_bad_manifest_is_refused": Fault("storage", "malformed manifests", "refused"),
    "test_artifacts::test_altered_files_are_named": Fault("storage", "file cut, removed, flipped", _NAMED),
    "test_artifacts::test_a_manifest_of_another_time_or_kind_is_refused": Fault("storage", "other version, kind", "refused"),
    "test_artifacts::test_two_runs_do_not_make_one_artifact_at_once": Fault("storage", "two writers", "the second is told"),
    "test_artifacts::test_inputs_that_were_altered_are_not_built_on": Fault("storage", "altered input", "refused"),
    "test_publish::test_two_writers_on_a_disk_never_touch_each_others_files": Fault(
        "storage", "two writers, at every file operation", "the second is told; the artifact verifies"
    ),
    "test_publish::test_a_claim_outlives_the_manifest": Fault("storage", "a writer during another's sums", "told"),
    "test_publish::test_what_a_kill_left_beside_the_manifest_is_removed_by_the_next_run": Fault(
        "storage", "killed right after the manifest", "the next run tidies up"
    ),
    "test_publish::test_a_disk_without_locks_is_refused": Fault("storage", "a disk without locks", "refused"),
    "test_publish_store::test_two_writers_on_a_store_never_touch_each_others_files": Fault(
        "storage", "two writers, at every request", "both get an artifact that verifies"
    ),
    "test_publish_store::test_two_writers_that_are_both_interrupted_on_a_store": Fault(
        "storage", "two writers, both interrupted", "both get an artifact that verifies"
    ),
    "test_publish_store::test_a_run_that_is_killed_at_any_request_is_continued_by_the_next": Fault(
        "storage", "killed at every request of a publish", _WHOLE
    ),
    "test_publish_store::test_a_run_that_was_killed_a_moment_ago_is_watched_and_continued": Fault(
        "storage", "killed, started again at once", _WHOLE
    ),
    "test_publish_store::test_a_run_that_is_alive_is_seen_and_not_removed": Fault(
        "storage", "a second run within the first", "the faster one is used"
    ),
    "test_publish_store::test_an_attempt_that_is_not_one_is_refused": Fault("security", "paths in a manifest", "refused"),
    "test_artifacts::test_what_is_read_by_content_is_verified_first": Fault("storage", "altered input", "refused"),
    "test_artifacts::test_a_folder_without_parts_is_an_error_with_its_name": Fault("storage", "no parts", _NAMED),
    "test_artifacts::test_a_root_with_a_query_is_refused": Fault("storage", "a root with a query", "refused"),
    "test_identity_encoders::test_shards_of_another_encoder_are_never_mixed_in": Fault(
        "embed", "killed, then another encoder", "vectors of one encoder"
    ),
    "test_identity_encoders::test_what_a_killed_driver_left_among_the_vectors_is_not_read": Fault(
        "embed", "foreign files among the vectors", "passed over"
    ),
    "test_identity_encoders::test_embeddings_outlive_the_catalog_that_they_were_made_from": Fault(
        "embed", "an older catalog removed", "read without it"
    ),
    "test_identity_encoders::test_a_model_that_nobody_has_is_one_error": Fault("embed", "no such model on the hub", "one error"),
    "test_storage::test_two_writers_never_touch_each_others_objects": Fault(
        "storage", "two writers, at every request to a server", "both get an artifact that verifies"
    ),
    "test_storage::test_a_killed_attempt_is_continued": Fault("storage", "driver killed on a store", _WHOLE),
    "test_storage::test_what_passes_by_itself_is_tried_again": Fault("storage", "500, 503, reset, cut body", "tried again"),
    "test_storage::test_a_store_that_stays_away_is_an_error_and_nothing_is_published": Fault(
        "storage", "store away for good", "an error, nothing published"
    ),
    "test_storage::test_altered_objects_are_named": Fault("storage", "altered object", _NAMED),
    "test_storage::test_snapshots_go_on_from_a_store": Fault("storage", "faults while snapshots are written", _WHOLE),
    "test_storage::test_a_store_that_is_killed_and_comes_back_changes_nothing": Fault(
        "storage", "server killed twice in a run", _SAME
    ),
    # --- requests
    "test_corpus::test_a_bad_request_is_refused": Fault("recommend", "malformed requests", "refused by history"),
    "test_recommender::test_more_than_the_catalog_holds": Fault("recommend", "k above the catalog", "what there is"),
    # --- jobs and clusters
    "test_jobs::test_a_killed_driver_resumes_with_the_same_command": Fault("job", "driver killed", "resumes, same hashes"),
    "test_submit::test_a_failing_job_fails_with_its_error_in_the_last_lines": Fault("job", "job fails", "exit code, error"),
    "test_submit::test_a_job_that_was_stopped_resumes_when_it_is_submitted_again": Fault("job", "ray job stop", "resumes"),
    "test_submit::test_without_the_token_nobody_gets_in": Fault("job", "no token", "401"),
    "test_cluster::test_what_a_node_lacks_is_said_with_the_cure": Fault("job", "a node lacks something", "an error, before"),
    "test_cluster::test_gpus_that_cannot_come_are_an_error": Fault("job", "no GPUs come", "an error"),
    "test_cluster::test_join_refuses_an_address_without_a_cluster": Fault("job", "no cluster there", "one error in 30 s"),
    "test_cluster::test_wait_for_reports_pending_demand_until_room_is_there": Fault("job", "a busy cluster", "reported"),
    # --- serving
    "test_serving_guard::test_who_brings_no_token_is_refused_before_anything_is_read": Fault("serve", "no token", "401, unread"),
    "test_serving_guard::test_a_body_is_read_up_to_its_limit": Fault("serve", "huge bodies", "413, read up to the limit"),
    "test_serve::test_an_open_port_needs_a_token": Fault("serve", "open port without a token", "refuses to start"),
    "test_serve::test_ray_s_other_proxy_ignores_the_host": Fault("serve", "a proxy that opens the port", "refuses to start"),
    "test_serving_routes::test_degenerate_models_are_found": Fault("serve", "models with constant, empty, NaN lists", "refused"),
    "test_serve::test_a_real_server": Fault("serve", "malformed requests; a copy killed", "4xx with the field; right answers"),
    "test_serve::test_models_are_swapped_under_load": Fault("serve", "an altered model, under load", "refused, old one answers"),
    # --- security
    "test_security::test_hostile_files_run_nothing": Fault("security", "pickles in artifacts", "nothing runs, refused"),
    "test_security::test_hostile_snapshots_run_nothing": Fault("security", "pickles in snapshots", "nothing runs, refused"),
    "test_security::test_a_text_encoder_brings_no_code_along": Fault("security", "code next to an encoder", "nothing runs"),
    "test_security::test_inputs_stand_beside_their_artifact": Fault("security", "paths out of the folder", "refused"),
    "test_security::test_a_category_is_a_name_and_no_path": Fault("security", "paths in a name", "refused"),
    "test_security::test_switches_that_let_data_run_code_are_refused": Fault("security", "unsafe switches", "exit code 8"),
    "test_logs::test_secrets_are_in_no_line": Fault("security", "secrets in lines", "redacted"),
}  # fmt: skip

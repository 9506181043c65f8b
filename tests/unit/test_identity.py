"""What the identity of an artifact depends on: for every key of the configuration, and for everything that is read."""

from __future__ import annotations

from typing import Any

import pytest

from tests.identities import config_of, identities
from tiger.core.config import describe, load_plugin, shipped_plugins
from tiger.data.sources.base import DatasetConfig
from tiger.models.base import ModelConfig
from tiger.run import RunConfig
from tiger.tokenizers.base import TokenizerConfig

# --- every key --------------------------------------------------------------------------------------------------

TOKENIZER = "tokenizer tuning"
KEYS: dict[str, tuple[str, str]] = {
    # key: (another value, the stages whose own identity it changes; what follows from them changes by their inputs)
    "root": ("elsewhere", ""),
    "warm_start": ("", "item_vectors tokenizer semantic_ids model"),  # its content counts, see test_append
    "data.kind": ("", "catalog"),  # see test_another_source_is_another_catalog
    "data.max_bad_row_fraction": ("0.5", ""),
    "data.items": ("201", "catalog"),
    "data.users": ("301", "catalog"),
    "data.mean_length": ("8", "catalog"),
    "data.noise": ("0.2", "catalog"),
    "data.new_item_fraction": ("0.1", "catalog"),
    "data.seed": ("1", "catalog"),
    "catalog.text_fields": ('["title"]', "catalog"),
    "catalog.k_core": ("4", "catalog"),
    "catalog.duplicates": ("all", "catalog"),
    "catalog.tie_break": ("id", "catalog"),
    "catalog.split": ("temporal", "catalog"),
    "catalog.valid_fraction": ("0.2", "catalog"),
    "catalog.test_fraction": ("0.2", "catalog"),
    "catalog.max_unknown_item_fraction": ("0.5", ""),
    "catalog.seed": ("1", "catalog"),
    "embedding.import_path": ("", ""),  # its content counts, see test_vectors_from_elsewhere_count_by_content
    "embedding.vectors_id": ("sku", ""),  # counts for own vectors alone, as in the same test
    "embedding.vectors_column": ("image", ""),
    "embedding.model": ("", "embeddings"),  # its content counts, see the tests of encoders below
    "embedding.prefix": ("passage: ", "embeddings"),
    "embedding.max_tokens": ("64", "embeddings"),
    "embedding.precision": ("float32", "embeddings"),
    "embedding.storage_dtype": ("float16", "embeddings"),
    "embedding.batch_tokens": ("512", ""),
    "embedding.resources.min_workers": ("2", ""),
    "embedding.resources.max_workers": ("2", ""),
    "embedding.resources.cpus": ("2", ""),
    "embedding.resources.gpus": ("0.25", ""),
    "collaborative.weight": ("0.3", "item_vectors"),
    "collaborative.rank": ("32", "item_vectors"),
    "collaborative.window": ("3", "item_vectors"),
    "collaborative.smoothing": ("1", "item_vectors"),
    "collaborative.ridge": ("1", "item_vectors"),
    "collaborative.seed": ("1", "item_vectors"),
    "tokenizer.kind": ("opq", TOKENIZER),
    "tokenizer.num_levels": ("4", TOKENIZER),
    "tokenizer.codebook_size": ("128", TOKENIZER),
    "tokenizer.kmeans_iterations": ("51", TOKENIZER),
    "tokenizer.kmeans_sample": ("90000", TOKENIZER),
    "tokenizer.training.epochs": ("41", TOKENIZER),
    "tokenizer.training.max_steps": ("9", TOKENIZER),
    "tokenizer.training.batch_size": ("128", TOKENIZER),
    "tokenizer.training.learning_rate": ("2e-3", TOKENIZER),
    "tokenizer.training.weight_decay": ("2e-4", TOKENIZER),
    "tokenizer.training.warmup_steps": ("101", TOKENIZER),
    "tokenizer.training.max_grad_norm": ("1.0", TOKENIZER),
    "tokenizer.training.validate_every_epochs": ("5.0", TOKENIZER),
    "tokenizer.training.patience": ("11", TOKENIZER),
    "tokenizer.training.precision": ("bfloat16", TOKENIZER),
    "tokenizer.seed": ("1", TOKENIZER),
    "tokenizer.distance": ("mixed", TOKENIZER),
    "tokenizer.sinkhorn_last_level": ("true", TOKENIZER),
    "tokenizer.hidden_dims": ("[256, 128]", TOKENIZER),
    "tokenizer.latent_dim": ("16", TOKENIZER),
    "tokenizer.linear_skip": ("false", TOKENIZER),
    "tokenizer.dropout": ("0.1", TOKENIZER),
    "tokenizer.commitment_weight": ("0.5", TOKENIZER),
    "tokenizer.codebook_update": ("gradient", TOKENIZER),
    "tokenizer.codebook_update_every": ("3", TOKENIZER),
    "tokenizer.codebook_update_until": ("0.5", TOKENIZER),
    "tokenizer.ema_decay": ("0.9", TOKENIZER),
    "tokenizer.reset_dead_codes": ("false", TOKENIZER),
    "tokenizer.gradient_estimator": ("rotation", TOKENIZER),
    "tokenizer.reconstruction_reduction": ("mean", TOKENIZER),
    "semantic_ids.collision_policy": ("extra_code", "semantic_ids"),
    "semantic_ids.items_per_id": ("2", "semantic_ids"),
    "semantic_ids.collision_codes": ("128", "semantic_ids"),
    "model.preset": ("medium", "model"),
    "model.d_model": ("96", "model"),
    "model.num_heads": ("2", "model"),
    "model.head_dim": ("8", "model"),
    "model.d_ff": ("64", "model"),
    "model.num_layers": ("1", "model"),
    "model.dropout": ("0.4", "model"),
    "model.encoder": ("bidirectional", "model"),
    "model.encoder_input": ("codes", "model"),
    "model.input_norm": ("false", "model"),
    "model.softmax": ("codes", "model"),
    "model.softmax_support": ("children", "model"),
    "model.item_vectors": ("false", "model"),
    "model.item_dropout": ("0.2", "model"),
    "model.max_history_items": ("10", "model"),
    "model.num_user_tokens": ("100", "model"),
    "model.training.validation_users": ("1000", "model"),
    "model.training.validation_beam": ("30", "model"),
    "model.training.epochs": ("31", "model"),
    "model.training.max_steps": ("9", "model"),
    "model.training.batch_size": ("128", "model"),
    "model.training.learning_rate": ("2e-3", "model"),
    "model.training.weight_decay": ("0.02", "model"),
    "model.training.warmup_steps": ("201", "model"),
    "model.training.max_grad_norm": ("2.0", "model"),
    "model.training.validate_every_epochs": ("2.0", "model"),
    "model.training.patience": ("6", "model"),
    "model.training.precision": ("float32", "model"),
    "model.seed": ("1", "model"),
    "model.kind": ("sasrec", "model"),
    "decoding.k": ("5", "recommendations"),
    "decoding.beam": ("60", "evaluation recommendations"),
    "decoding.exclude_seen": ("false", "recommendations"),
    "decoding.new_item_boost": ("1.0", "evaluation recommendations"),
    "decoding.temperature": ("0.5", "recommendations"),
    "decoding.max_per_first_code": ("2", "recommendations"),
    "decoding.seed": ("1", "recommendations"),
    "decoding.batch_size": ("32", ""),
    "decoding.resources.min_workers": ("2", ""),
    "decoding.resources.max_workers": ("2", ""),
    "decoding.resources.cpus": ("2", ""),
    "decoding.resources.gpus": ("0.5", ""),
    "evaluation.metrics": ('["recall"]', "evaluation"),
    "evaluation.baselines": ('["popularity"]', "evaluation"),
    "evaluation.compare_with": ("", "evaluation"),  # the fingerprints of the models count
    "evaluation.semantic_ids": ("", "evaluation"),  # it is an input
    "evaluation.max_users": ("100", "evaluation"),
    "evaluation.num_exact_users": ("100", "evaluation"),
    "evaluation.seed": ("1", "evaluation"),
    "recommend.users": ("50", "recommendations"),
    "recommend.histories": ("", "recommendations"),  # their content counts, see test_histories_count_by_content
    "recommend.semantic_ids": ("", "recommendations"),  # it is an input
    "recommend.fields": ('["titles"]', "recommendations"),
    "recommend.json_lines": ("true", "recommendations"),
    "recommend.allowed_items_file": ("", "recommendations"),  # its content counts, see test_a_filter_counts_by_content
    # Appends are made for a finished model; what changes their identity is in test_append.
    "append.items": ("", ""),
    "append.interactions": ("", ""),
    "append.deleted_file": ("", ""),
    "append.onto": ("", ""),
    "append.limits.max_error_ratio": ("2", ""),
    "append.limits.max_far_fraction": ("0.5", ""),
    "append.limits.max_prefix_churn": ("0.5", ""),
    "append.limits.max_moved_fraction": ("0.5", ""),
    "append.limits.max_crowded_fraction": ("0.5", ""),
    "append.limits.max_growth": ("1", ""),
    "append.limits.min_recall_ratio": ("1", ""),
    "serve.host": ("127.0.0.2", ""),
    "serve.port": ("8001", ""),
    "serve.semantic_ids": ("runs/semantic_ids-5e6f7a8b", ""),
    "serve.token_file": ("token", ""),
    "serve.allowed_origins": ('["https://shop.example"]', ""),
    "serve.tls_cert_file": ("cert.pem", ""),
    "serve.tls_key_file": ("key.pem", ""),
    "serve.request_seconds": ("5", ""),
    "serve.max_queued_requests": ("64", ""),
    "serve.max_replicas": ("4", ""),
    "serve.config_file": ("serve.yaml", ""),
    "serve.resources.min_workers": ("2", ""),
    "serve.resources.max_workers": ("2", ""),
    "serve.resources.cpus": ("2", ""),
    "serve.resources.gpus": ("0.5", ""),
    "scale.gpus": ("0", ""),
    "scale.wait_minutes": ("5", ""),
    "scale.training.min_workers": ("2", ""),
    "scale.training.max_workers": ("2", ""),  # changes rounding and dropout only; a snapshot says when it changes
    "scale.training.cpus": ("2", ""),
    "scale.training.gpus": ("0", ""),
    "scale.collective_seconds": ("60", ""),
    "scale.dollars_per_hour": ("1.5", "report"),
    "scale.in_process_megabytes": ("0", ""),
    "scale.max_failures": ("1", ""),
    "tracking.tensorboard": ("boards", ""),
    "tracking.mlflow": ("http://127.0.0.1:5000", ""),
    "tracking.experiment": ("other", ""),
}

NEEDS = {"model.num_user_tokens": "model.encoder=bidirectional"}
"""What must be set for the other value to be possible."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return identities(config_of())


def test_the_table_has_every_key() -> None:
    assert {key for key, *_ in describe(RunConfig)} == set(KEYS)


@pytest.mark.parametrize("key", [key for key, (value, _) in KEYS.items() if value])
def test_a_key_changes_the_identity_of_exactly_its_stages(key: str, base: dict[str, str]) -> None:
    value, stages = KEYS[key]
    if key in NEEDS:
        base = identities(config_of(NEEDS[key]))
    found = identities(config_of(*([NEEDS[key]] if key in NEEDS else []), f"{key}={value}"))
    assert found.keys() == base.keys()
    assert {kind for kind in base if found[kind] != base[kind]} == set(stages.split())


UNFINGERPRINTED: dict[str, set[str]] = {
    # of the other sources and tokenizers: keys that say where files are, or when to stop, or how fast to go
    "tiger.data.sources.synthetic": {"max_bad_row_fraction"},
    "tiger.data.sources.tables": {"max_bad_row_fraction", "items", "interactions"},
    "tiger.data.sources.amazon": {"max_bad_row_fraction", "path", "items", "interactions", "category", "version"},
    "tiger.tokenizers.rqvae": set(),
    "tiger.tokenizers.rkmeans": set(),
    "tiger.tokenizers.opq": set(),
    **{f"tiger.models.{kind}": set() for kind in shipped_plugins("tiger.models")},
}


@pytest.mark.parametrize("plugin", [DatasetConfig, TokenizerConfig, ModelConfig])
def test_every_other_key_of_every_plugin_counts(plugin: Any) -> None:
    for kind in shipped_plugins(plugin.plugin_package):
        config = load_plugin(plugin.plugin_package, kind).Config
        declared = UNFINGERPRINTED[f"{plugin.plugin_package}.{kind}"]
        assert set(config.unfingerprinted) == declared
        values = dict.fromkeys(config.model_fields, "x")
        assert set(config.model_construct(**values).identity()) == set(config.model_fields) - declared

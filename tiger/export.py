"""Export a trained model to a folder in the form of the Hugging Face Hub, with a model card.

    tiger export runs/model-1a2b3c4d [--output FOLDER] [--push USER/NAME]
    tiger export runs/model-1a2b3c4d --sid-csv FOLDER

The folder holds safetensors, config.json, semantic IDs as Parquet, the options of the run as run.toml and a model
card; `tiger.Recommender.load(FOLDER)` or `tiger.Recommender.load("hf://USER/NAME")` opens it. --push needs the extra
`hub` and a token of the hub. --sid-csv writes the semantic IDs, the items and the interactions as the three CSV files
that SIDInspector reads; they hold user ids, and are not part of the exported folder.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

import tiger
from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import dump_toml
from tiger.core.errors import ConfigError, ResourceError, TigerError
from tiger.core.storage import MANIFEST, Folder
from tiger.data.catalog import Catalog
from tiger.data.histories import most_popular
from tiger.evaluation.evaluator import EvaluationResult
from tiger.models.base import ModelConfig, StoredData, load_family
from tiger.models.exported import CONFIG, FORMAT, ITEMS, VECTORS
from tiger.training.weights import WEIGHTS

_SECTIONS = {"embeddings": "embedding", "item_vectors": "collaborative", "tokenizer": "tokenizer",
             "semantic_ids": "semantic_ids", "model": "model"}  # fmt: skip
_SHOWN = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


def export(model: Artifact, target: Folder) -> None:
    """Write a model, its items and a model card to a folder.

    Raises:
        ConfigError: a family without weights, or the folder is not empty.
    """
    options = ModelConfig.resolve(model.manifest["config"])
    if not hasattr(load_family(options), "train"):
        raise ConfigError(f"{model.folder.uri}: {options.kind} has no weights; only trained models are exported")
    if target.files():
        raise ConfigError(f"{target.uri} is not empty; choose another --output")
    data = StoredData(model.inputs)
    columns: dict[str, Any] = {
        "item_id": np.arange(data.num_items, dtype=np.int32),
        "source_id": pa.array(data.catalog.source_ids),
        "title": pa.array(data.catalog.titles),
        "training_count": data.histories.training_counts(data.num_items),
    }
    config: dict[str, Any] = {
        "model_type": "tiger-on-ray", "format": FORMAT, "tiger_version": tiger.__version__,
        "architectures": [options.kind], "num_items": data.num_items, "fingerprint": model.fingerprint,
        "model": model.manifest["config"],
    }  # fmt: skip
    if "semantic_ids" in options.inputs:
        ids = data.semantic_ids
        flat = pa.array(ids.codes.ravel())
        columns["codes"] = pa.FixedSizeListArray.from_arrays(flat, ids.codes.shape[1])
        config |= {"level_sizes": list(ids.level_sizes), "levels": ids.levels}
        target.write_tensors(VECTORS, {"vectors": data.text_embeddings.contiguous()})
    target.write_table(ITEMS, pa.table(columns))
    target.write_bytes(WEIGHTS, model.folder.read_bytes(WEIGHTS))
    target.write_json(CONFIG, config)
    target.write_bytes("run.toml", dump_toml(run_options(model)).encode())
    target.write_bytes("README.md", model_card(model, find_evaluation(model)).encode())


def run_options(model: Artifact) -> dict[str, Any]:
    """Return the options of all stages up to a model, as sections of a configuration."""
    sections: dict[str, Any] = {}
    for artifact in model.lineage():
        if artifact.kind == "catalog":
            sections |= artifact.manifest["config"]
        elif artifact.kind in _SECTIONS:
            sections[_SECTIONS[artifact.kind]] = artifact.manifest["config"]
    return sections


def find_evaluation(model: Artifact) -> EvaluationResult | None:
    """Return the last evaluation of a model in the same root; None if there is none."""
    root, found = model.home.parent, []
    for info in root.entries(recursive=False):
        folder = root.child(info.base_name)
        if info.base_name.startswith("evaluation-") and folder.exists(MANIFEST):
            artifact = open_artifact(folder)
            if artifact.manifest["inputs"].get("model") == model.fingerprint:
                found.append((info.mtime_ns or 0, artifact.fingerprint, artifact))
    if not found:
        return None
    return EvaluationResult.model_validate(max(found)[2].folder.read_json("evaluation.json"))


def model_card(model: Artifact, evaluation: EvaluationResult | None) -> str:
    """Return the model card: what it is, its figures, how to load it and how it was made."""
    catalog = Catalog(model.inputs["catalog"])
    counts, data = catalog.artifact.metrics, catalog.artifact.manifest["config"]["data"]
    name = data.get("category") or data["kind"]
    counts_of = catalog.histories.training_counts(catalog.n_items)  # no user's own history becomes the example
    example = json.dumps([catalog.source_ids[item] for item in most_popular(counts_of, 2)])
    kind = model.manifest["config"]["kind"]
    lines = [
        "---", "library_name: tiger-on-ray", "tags: [recommendation, generative-retrieval, semantic-ids, tiger]", "---",
        "",
        f"# {kind}, {name}", "",
        f"A recommender of {counts['items']:,} items, trained on {counts['interactions']:,} interactions of "
        f"{counts['users']:,} users with TIGER on Ray {tiger.__version__}.", "",
        "```python", "import tiger", "", 'recommender = tiger.Recommender.load("FOLDER")  # or "hf://USER/NAME"',
        f"print(recommender.recommend([{example}], k=5))", "```", "",
    ]  # fmt: skip
    lines += ["## Results", ""]
    if evaluation is None:
        lines += ["This model has not been evaluated: `tiger evaluate` its folder before it is exported.", ""]
    else:
        lines += list(_results(evaluation))
    lines += ["## How it was made", "", "```", "tiger pipeline run.toml", "```", "",
              "`run.toml` has all options; the raw files had these checksums (sha256):", ""]  # fmt: skip
    lines += [f"- {role}: `{digest}`" for role, digest in catalog.artifact.manifest["source"].items()]
    lines += ["", "| package | version |", "|---|---|"]
    lines += [f"| {package} | {version} |" for package, version in model.manifest["versions"].items()]
    return "\n".join([*lines, ""])


def _results(evaluation: EvaluationResult) -> Iterator[str]:
    split = evaluation.splits["test"]
    first = next(iter(split.methods.values()))
    shown = [metric for metric in _SHOWN if metric in first.metrics] or list(first.metrics)[:4]
    yield f"Test, {split.users:,} users; every item is ranked, no sampled negatives; 95 % intervals over users."
    yield ""
    yield f"| method | {' | '.join(shown)} |"
    yield f"|---|{'---|' * len(shown)}"
    for method, result in split.methods.items():
        cells = (f"{result.metrics[m]:.4f} ({result.ci95[m][0]:.4f} to {result.ci95[m][1]:.4f})" for m in shown)
        yield f"| {method.replace('_', ' ')} | {' | '.join(cells)} |"
    yield ""


# --- SIDInspector -----------------------------------------------------------------------------------------------


def write_sid_csv(model: Artifact, target: Folder) -> None:
    """Write sid_codes.csv, item_metadata.csv and interactions.csv, as SIDInspector's examples have them.

    Raises:
        ConfigError: the model has no semantic IDs.
    """
    if "semantic_ids" not in model.inputs:
        raise ConfigError(f"{model.folder.uri} has no semantic IDs; --sid-csv needs a model that has")
    data = StoredData(model.inputs)
    names, codes = data.catalog.source_ids, data.semantic_ids.codes
    heads = ["item_id", *(f"sid_{level}" for level in range(codes.shape[1]))]
    rows = ([name, *row] for name, row in zip(names, codes.tolist(), strict=True))
    target.write_bytes("sid_codes.csv", _csv(heads, rows))
    config = data.catalog.artifact.manifest["config"]["data"]
    dataset = config.get("category") or config["kind"]
    has_leaf = "category_leaf" in data.catalog.items.column_names
    categories = data.catalog.items["category_leaf"].to_pylist() if has_leaf else [""] * len(names)
    items = ([dataset, *row] for row in zip(names, categories, data.catalog.titles, strict=True))
    target.write_bytes("item_metadata.csv", _csv(["dataset", "item_id", "category", "title"], items))
    target.write_bytes("interactions.csv", _csv(["dataset", "user_id", "item_id", "split"], _events(data, dataset)))


def _events(data: StoredData, dataset: str) -> Iterator[Sequence[Any]]:
    histories, names = data.histories, data.catalog.source_ids
    for user, name in enumerate(histories.source_ids):
        begin = histories.offsets[user]
        for position, item in enumerate(histories.of(user).tolist(), start=int(begin)):
            split = "train" if position < histories.train_end[user] else "valid"
            yield dataset, name, names[item], "test" if position >= histories.valid_end[user] else split


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return buffer.getvalue().encode()


# --- command ----------------------------------------------------------------------------------------------------


def push(folder: Folder, name: str) -> str:
    """Upload an exported folder to the hub as a private model; return its address.

    Raises:
        ResourceError: the client is not installed, there is no token, or the hub refuses.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ResourceError('--push needs the client of the hub: pip install "tiger-on-ray[hub]"') from None
    try:
        hub = huggingface_hub.HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder.path))
    except Exception as error:  # of the hub's client or its HTTP library
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ResourceError(f"{name} cannot be pushed: {reason}; `hf auth login` stores a token") from None


def main(arguments: list[str]) -> int:
    """Export; return the exit code."""
    parser = argparse.ArgumentParser("tiger export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="the folder of a trained model")
    parser.add_argument("--output", metavar="FOLDER", help="a new folder (default: export-FINGERPRINT)")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the hub, as a private model")
    parser.add_argument("--sid-csv", metavar="FOLDER", help="write the CSV files of SIDInspector, and nothing else")
    options = parser.parse_args(arguments)
    try:
        model = open_artifact(options.model, expected_kind="model")
        model.verify()
        target = Folder(options.sid_csv or options.output or f"export-{model.fingerprint}")
        if options.sid_csv:
            write_sid_csv(model, target)
        else:
            export(model, target)
        print(target.uri)
        if options.push and not options.sid_csv:
            print(push(target, options.push))
    except TigerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0

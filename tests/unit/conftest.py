"""Made once: tiny checkpoints of other libraries, tables as nights make them, an indexed table beside DuckDB."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from command import Run, runner
from lance.fragment import write_fragments

if TYPE_CHECKING:
    from conjoin.pipeline.query import Table


@pytest.fixture
def conjoin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process."""
    return runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `clip`, `siglip`, `clap` and `bert` as transformers saves them: tiny, random, over a few words."""
    import torch
    import transformers as library

    from conjoin.encoders import tokenizer

    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    words = library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.train(["red apple", "green pear", "a blue violin"]),
        model_max_length=20,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    special = {"vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    text = {"max_position_embeddings": 20, "projection_dim": 12, **special, **small}
    vision = {"image_size": 32, "patch_size": 8, "projection_dim": 12, **small}
    audio = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [1, 2]}
    models = {
        "clip": library.CLIPModel(library.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)),
        "siglip": library.SiglipModel(
            library.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision)
        ),
        "clap": library.ClapModel(
            library.ClapConfig(
                text_config={**text, "max_position_embeddings": 24},
                audio_config={"window_size": 8, "projection_dim": 12, **audio},
                projection_dim=12,
            )
        ),
        "bert": library.BertModel(library.BertConfig(**{**special, **small, "max_position_embeddings": 24})),
    }
    scalars = {"logit_scale": 3.5, "logit_scale_a": 3.25, "logit_scale_t": 2.5, "logit_bias": -12.5}
    crop = {"size": {"shortest_edge": 36}, "crop_size": 32, "do_center_crop": True, "resample": 3}
    squash = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2}
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            for scalar, value in scalars.items():
                if hasattr(model, scalar):
                    getattr(model, scalar).fill_(value)
        model.eval().save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    for name, prepared in {"clip": crop, "siglip": squash}.items():
        stored = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.25, 0.27], **prepared}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(stored))
    library.ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(folder / "clap")
    return folder


@dataclass(frozen=True, slots=True)
class Nights:
    """A table as nights with run ids make it, without Ray."""

    uri: str

    def first(self, rows: pa.Table, run: str = "r1", *, fragments: int = 4, live: bool = True) -> Any:
        staged = write_fragments(
            rows,
            self.uri,
            schema=rows.schema,
            mode="create",
            max_rows_per_file=-(-rows.num_rows // fragments),
            data_storage_version="2.2",
        )
        operation = lance.LanceOperation.Overwrite(rows.schema, staged)
        transaction = lance.Transaction(read_version=0, operation=operation, transaction_properties={"run_id": run})
        lance.LanceDataset.commit(self.uri, transaction, enable_stable_row_ids=False)
        return self.publish() if live else lance.dataset(self.uri)

    def next(
        self,
        run: str,
        *,
        delete: Sequence[object] = (),
        insert: pa.Table | None = None,
        columns: pa.Table | None = None,
        properties: Mapping[str, str] | None = None,
        detached: bool = False,
    ) -> Any:
        """One Update: rows deleted by id, rows inserted, columns of the rows with these ids written anew."""
        head = lance.dataset(self.uri)
        updated, fields = {}, []
        for fragment in head.get_fragments():
            found = fragment.to_table(columns=["id"], with_row_address=True)
            gone = found.filter(pc.is_in(found["id"], value_set=pa.array(list(delete), found["id"].type)))
            number = fragment.fragment_id
            if columns is not None and pc.any(pc.is_in(found["id"], value_set=columns["id"])).as_py():
                updated[number], fields = fragment.update_columns(columns, left_on="id", right_on="id")
            if gone.num_rows:
                left = fragment.delete_rows([address & 0xFFFFFFFF for address in gone["_rowaddr"].to_pylist()])
                if number in updated:
                    updated[number].deletion_file = left.deletion_file
                else:
                    updated[number] = left
        operation = lance.LanceOperation.Update(
            updated_fragments=list(updated.values()),
            new_fragments=write_fragments(insert, self.uri, mode="append") if insert is not None else [],
            fields_modified=list(fields),
            update_mode="rewrite_columns" if fields else "rewrite_rows",
        )
        transaction = lance.Transaction(
            read_version=head.version,
            operation=operation,
            transaction_properties={**(properties or {}), "run_id": run},
        )
        return lance.LanceDataset.commit(self.uri, transaction, detached=detached)

    def publish(self) -> Any:
        """The head becomes live."""
        head = lance.dataset(self.uri)
        (head.tags.update if "live" in head.tags.list() else head.tags.create)("live", head.version)
        return head


@pytest.fixture
def nights(tmp_path: Path) -> Nights:
    """An empty place for a table."""
    return Nights(f"{tmp_path}/nights.lance")


@dataclass(frozen=True, slots=True)
class Things:
    """12,000 rows of 32 dimensions with an index, open, and DuckDB over the same rows; nobody changes them."""

    table: Table
    made: Any
    duckdb: duckdb.DuckDBPyConnection

    def query(self, seed: int = 0) -> np.ndarray:
        """(32,) in the neighbourhood of a row."""
        rng = np.random.default_rng(seed)
        vector = self.made.vectors["image_vec"][rng.integers(len(self.made.rows))]
        found = vector + 0.1 * rng.normal(size=vector.shape)
        return found / np.linalg.norm(found)

    def exactly(self, sql: str, query: np.ndarray) -> pa.Table:
        """What DuckDB says of all rows; DIST stands for the distance of image_vec to the query."""
        exact = f"array_cosine_distance(image_vec, {[float(x) for x in query]}::FLOAT[32])"
        return self.duckdb.sql(re.sub(r"\bDIST\b", exact, sql)).to_arrow_table()

    def radius(self, query: np.ndarray, rank: int = 200) -> float:
        """Halfway between the distances of two neighbours in rank."""
        near = self.exactly(f"SELECT DIST AS d FROM things ORDER BY d LIMIT {rank + 1}", query)["d"].to_numpy()
        return float(near[-2] + near[-1]) / 2

    def answered(self, sql: str, query: np.ndarray, **options: Any) -> pa.Table:
        return self.table.sql(self.ours(sql), {"v": query}, **options).to_arrow()

    def explained(self, sql: str, **options: Any) -> Any:
        return self.table.explain(self.ours(sql), {"v": self.query()}, **options)

    @staticmethod
    def ours(sql: str) -> str:
        return re.sub(r"\bDIST\b", "distance(image_vec, $v)", sql)


@pytest.fixture(scope="session")
def things(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Things:
    from conjoin.pipeline import index, store
    from conjoin.pipeline.query import open_table

    made = make_table_at(f"{tmp_path_factory.mktemp('indexed')}/things.lance", 12_000, 32, columns=("image_vec",))
    index.build(made.uri, store.TableConfig(path=made.uri), exact_floats=100_000)
    connection = duckdb.connect()
    connection.register("things", made.rows)
    return Things(open_table(made.uri, None), made, connection)

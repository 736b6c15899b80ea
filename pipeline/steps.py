"""What one rank computes of each step: its rows, and the decoded values of towers that are trained whole.

Assumes: pipeline/order.py decided which rows make a step; here they are only read. What is drawn at random for a row
(an item of a list, an augmentation) depends on (seed, epoch, row) alone.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conjoin.pipeline import workers
from conjoin.pipeline.features import draw_item, items_of, reading_units
from conjoin.pipeline.order import Order, Positions, share
from conjoin.pipeline.selection import Selection

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.encoders.spec import TowerSpec
    from conjoin.pipeline.source import SourceConfig

# Row groups of the current window, in the process that decodes them: its steps all read the same ones.
_kept: OrderedDict[tuple[str | int, ...], pa.Table] = OrderedDict()
_KEPT_BYTES = 256 << 20
_STREAMED_STEPS = 512
# Reading ahead gives way to the training: a thread of torch that waits for its turn holds up all the others.
_NICE = 10

Values = list["str | NDArray[np.generic]"]


@dataclass(frozen=True, slots=True)
class Raw:
    """A tower that is trained whole: its values are read and decoded each epoch."""

    modality: str
    spec: TowerSpec


@dataclass(frozen=True, slots=True)
class Decoded:
    """values[i] belongs to the i-th true entry of present, over a rank's rows of one step."""

    values: Values
    present: NDArray[np.bool_]

    @property
    def num_bytes(self) -> int:
        return sum(value.nbytes if isinstance(value, np.ndarray) else len(value) for value in self.values)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads and decodes the rows of a rank; `augment` only while training."""

    rows: Selection
    raws: tuple[Raw, ...]
    seed: int
    augment: bool

    def read(self, positions: Positions, epoch: int, threads: int = 0) -> dict[str, Decoded]:
        """The values of these rows, in this order; threads: as in decode."""
        from conjoin.pipeline.decode import decode

        # a row with a weight may be twice in a step
        unique, back = np.unique(positions, return_inverse=True)
        values: dict[str, list[object]] = {raw.modality: [None] * len(unique) for raw in self.raws}
        for unit in reading_units(self.rows, unique):
            places = np.searchsorted(unique, np.array(unit["position"]))
            for modality, found in self._values(unit).items():
                for place, value in zip(places.tolist(), found, strict=True):
                    values[modality][place] = self._one(value, epoch, int(unique[place]))
        done = {}
        for raw in self.raws:
            decoded = decode(raw.spec, [values[raw.modality][place] for place in back.tolist()], threads=threads)
            present = np.zeros(len(positions), dtype=bool)
            present[decoded.owners] = True
            kept = [
                self._augmented(v, epoch, int(positions[o]))
                for v, o in zip(decoded.values, decoded.owners, strict=True)
            ]
            done[raw.modality] = Decoded(kept, present)
        return done

    def _values(self, unit: Mapping[str, object]) -> dict[str, Sequence[object]]:
        """The values of a read, by modality: of those that its part of the data has."""
        from conjoin.pipeline.source import columns_of, python_values, values_of

        source = self.rows.sources[int(str(unit["source"]))]
        there = [raw.modality for raw in self.raws if raw.modality in source.modalities]
        columns = list(dict.fromkeys(column for modality in there for column in columns_of(source, modality)))
        if not columns:
            return {}
        where = (str(unit["file"]), int(str(unit["row_group"])))
        table = _rows(source, where, columns, np.array(unit["rows"]))
        return {modality: python_values(values_of(source, table, modality)) for modality in there}

    def _one(self, value: object, epoch: int, position: int) -> object:
        """One item of a list per epoch while training; what embedding takes of it otherwise."""
        if isinstance(value, list) and self.augment and (value := items_of(value)):
            return value[draw_item((self.seed, epoch), position, len(value))]
        return value

    def _augmented(self, value: object, epoch: int, position: int) -> str | NDArray[np.generic]:
        from conjoin.encoders.transforms import augment_image

        if self.augment and isinstance(value, np.ndarray) and value.ndim == 3:
            return augment_image(value, np.random.default_rng([self.seed, epoch, position, 1]))
        return value  # type: ignore[return-value]  # decode gives str or an array


def _rows(source: SourceConfig, where: tuple[str, int], columns: list[str], rows: Positions) -> pa.Table:
    """Rows of a row group, which is kept for the next steps of its window if it is not too large.

    where: file and row group.
    """
    import pyarrow as pa

    from conjoin.pipeline.source import read_rows, row_group_bytes

    key: tuple[str | int, ...] = (*where, source.id, *columns)
    if key in _kept:
        _kept.move_to_end(key)
    elif row_group_bytes(*where, columns) <= _KEPT_BYTES // 4:
        _kept[key] = read_rows(source, *where, columns)
        while sum(table.nbytes for table in _kept.values()) > _KEPT_BYTES and len(_kept) > 1:
            _kept.popitem(last=False)
    else:
        return read_rows(source, *where, columns, rows)
    return _kept[key].take(pa.array(rows))


def stream(
    reader: Reader, order: Order, first_step: int, last_step: int, place: tuple[int, int]
) -> Iterator[dict[str, Decoded]]:
    """This rank's decoded share of steps first_step .. last_step - 1, read ahead by tasks of this rank's own Ray Data
    stream; place: (rank, world)."""
    for start in range(first_step, last_step, _STREAMED_STEPS):
        yield from _segment(reader, order, (start, min(start + _STREAMED_STEPS, last_step)), place)


def _segment(
    reader: Reader, order: Order, steps: tuple[int, int], place: tuple[int, int]
) -> Iterator[dict[str, Decoded]]:
    """One Ray Data run: its list of rows is in memory, so a long training is cut into several."""
    import ray.data

    items = [{"epoch": epoch, "rows": rows} for epoch, rows in rank_steps(order, *steps, place)]
    with workers.data_settings():
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        tasks = ray.data.TaskPoolStrategy(size=max(2, workers.num_cpus() // place[1]))
        # No CPU is asked for, `size` bounds them: Ray Data shares out each node's free CPUs over the ranks' streams and
        # rounds down, and a stream with a share of none reads one step at a time while its scheduler spins.
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _read_step, fn_kwargs={"reader": reader}, batch_size=1, compute=tasks, num_cpus=0
        )
        for batch in dataset.iter_batches(batch_size=1, prefetch_batches=2):
            yield unpack(batch, reader.raws)


def rank_steps(
    order: Order, first_step: int, last_step: int, place: tuple[int, int]
) -> Iterator[tuple[int, Positions]]:
    """(what its random draws depend on: see Order.draw, this rank's rows) of each step."""
    step = first_step
    while step < last_step:
        epoch, inside = divmod(step, order.steps_per_epoch)
        for rows in order.steps(epoch, inside):
            if step >= last_step:
                return
            yield order.draw(step), share(rows, *place)
            step += 1


def _read_step(batch: Mapping[str, NDArray[np.generic]], reader: Reader) -> dict[str, list[object]]:
    """In one thread: as many tasks as CPUs run at a time. Linux knows priorities by thread, so it takes its own with it
    and leaves those of the process, which Ray uses again, as they are."""
    rows, epoch = np.array(batch["rows"][0], dtype=np.int64), int(batch["epoch"][0])
    with ThreadPoolExecutor(1, "read", initializer=os.nice, initargs=(_NICE,)) as pool:
        done = pool.submit(reader.read, rows, epoch, threads=1).result()
    return {"decoded": [pickle.dumps(done, protocol=5)]}


def unpack(batch: Mapping[str, NDArray[np.generic]], raws: tuple[Raw, ...]) -> dict[str, Decoded]:
    """The decoded values of one step out of Ray's block."""
    done: dict[str, Decoded] = pickle.loads(batch["decoded"][0])  # noqa: S301  # from our own task, over Ray
    return {raw.modality: done[raw.modality] for raw in raws}

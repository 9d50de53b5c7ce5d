"""Rows in files: what is written is read bit for bit, and what is not whole is found."""

import os
import pickle
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from distill.errors import UserError
from distill.store import Quantity, Rows, StoredRows, missing_shards, stored_rows, write_shard
from distill.store.quantities import DTYPES
from tests.store.sample_stores import KEY, files, files_of_at_most, in_a_fork, random_rows, read_all, write_all

EMBEDDING = Quantity("embedding", (3,), torch.float32)
LOGITS = Quantity("logits", (2, 2), torch.bfloat16, {"temperature": 4.0})
ROWS = Rows(images=5, draws=2, per_shard=4)


@pytest.fixture
def store(tmp_path):
    for quantity in (EMBEDDING, LOGITS):
        write_all(tmp_path, quantity, ROWS, random_rows(quantity, ROWS))
    return tmp_path


def stored(folder, *quantities, rows=ROWS, key=KEY):
    return StoredRows(folder, "train", quantities or (EMBEDDING, LOGITS), rows, key)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_every_row_is_read_bit_for_bit_alone_and_in_any_batch(data):
    integers = st.integers(1, 5)
    quantity = Quantity(
        "any.quantity-1",
        tuple(data.draw(st.lists(integers, max_size=3), "shape")),
        DTYPES[data.draw(st.sampled_from(sorted(DTYPES)), "dtype")],
    )
    rows = Rows(data.draw(integers, "images"), data.draw(integers, "draws"), data.draw(st.integers(1, 30), "per_shard"))
    values = torch.empty(len(rows), *quantity.shape, dtype=quantity.dtype)
    bits(values).random_(generator=torch.Generator().manual_seed(data.draw(integers, "seed")))  # NaN and infinity, too
    sample = st.tuples(st.integers(0, rows.draws - 1), st.integers(0, rows.images - 1))
    samples = data.draw(st.lists(sample, max_size=12), "samples")
    with tempfile.TemporaryDirectory() as folder:
        write_all(folder, quantity, rows, values)
        assert len(list(Path(folder).rglob("*.safetensors"))) == rows.shards
        reader = stored(folder, quantity, rows=rows)
        reader.check()
        batch = reader.batch([draw for draw, _ in samples], [index for _, index in samples])[quantity.name]
        assert batch.shape == (len(samples), *quantity.shape)
        for position, (draw, index) in enumerate(samples):
            row = reader[draw, index][quantity.name]
            assert row.dtype == batch.dtype == quantity.dtype
            expected = values.reshape(rows.draws, rows.images, *quantity.shape)[draw, index]
            assert torch.equal(bits(row.reshape(1, -1)), bits(expected.reshape(1, -1)))
            assert torch.equal(bits(batch[position].reshape(1, -1)), bits(expected.reshape(1, -1)))


@given(st.integers(1, 50), st.integers(1, 5), st.integers(1, 60))
def test_the_files_divide_the_rows_and_a_row_is_of_one_sample(images, draws, per_shard):
    rows = Rows(images, draws, per_shard)
    assert [row for number in range(rows.shards) for row in rows.of(number)] == list(range(len(rows)))
    assert [rows.row(index, draw) for draw in range(draws) for index in range(images)] == list(range(len(rows)))
    assert all(len(rows.of(number)) == per_shard for number in range(rows.shards - 1))


def test_rows_are_copies_that_keep_no_file(store):
    reader = stored(store)
    row, batch = reader[0, 1]["embedding"], reader.batch([0, 1], [1, 2])["embedding"]
    assert row.untyped_storage().nbytes() == EMBEDDING.bytes
    assert batch.untyped_storage().nbytes() == 2 * EMBEDDING.bytes
    before = files(store)
    row.zero_()
    batch.zero_()
    assert reader[0, 1]["embedding"].abs().min() > 0
    assert files(store) == before


@pytest.mark.parametrize("sample", [(2, 0), (0, 5), (-1, 0), (0, -1)])
def test_a_sample_that_is_not_stored_is_refused_and_no_other_row_is_read(sample, store):
    draw, index = sample
    for read in (lambda: stored(store)[sample], lambda: stored(store).batch([0, draw], [0, index])):
        with pytest.raises(
            UserError, match=f"image {index} in draw {draw} is not stored: there are 5 images in 2 draws"
        ):
            read()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_of_a_data_loader_read_the_rows(start, store):
    reader = stored(store)
    expected = reader.batch([1] * 5, range(5))  # with maps open before the workers start
    samples = [(1, index) for index in range(5)]
    loader = DataLoader(reader, batch_size=2, sampler=samples, num_workers=2, multiprocessing_context=start)
    batches = list(loader)
    for name in ("embedding", "logits"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])


def test_nothing_open_is_pickled(store):
    reader = stored(store)
    expected = reader.batch([0, 1], [4, 2])
    content = pickle.dumps(reader)
    assert len(content) < 1000
    again = pickle.loads(content).batch([0, 1], [4, 2])
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_maps_are_few_and_no_file_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_rows, "OPEN_SHARDS", 4)
    rows = Rows(images=20, draws=1, per_shard=1)
    values = random_rows(EMBEDDING, rows)
    write_all(tmp_path, EMBEDDING, rows, values)
    reader = stored(tmp_path, EMBEDDING, rows=rows)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for index in range(20):
            assert torch.equal(reader[0, index]["embedding"], values[index])
            assert Path("/proc/self/maps").read_text().count(str(tmp_path)) <= 4
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_added_draws_move_no_row_and_rewrite_only_the_last_file(tmp_path):
    few, more = Rows(images=5, draws=2, per_shard=4), Rows(images=5, draws=5, per_shard=4)
    values = random_rows(EMBEDDING, more)
    write_all(tmp_path, EMBEDDING, few, values)
    before = files(tmp_path)
    assert missing_shards(tmp_path, "train", EMBEDDING, few, KEY) == []
    assert missing_shards(tmp_path, "train", EMBEDDING, more, KEY) == [2, 3, 4, 5, 6]
    with pytest.raises(
        UserError, match="lacks 5 of the 7 files .*00002.safetensors' has another number of rows, .*missing"
    ):
        stored(tmp_path, EMBEDDING, rows=more).check()
    for number in missing_shards(tmp_path, "train", EMBEDDING, more, KEY):
        of = more.of(number)
        write_shard(tmp_path, "train", EMBEDDING, number, values[of.start : of.stop], KEY)
    assert torch.equal(read_all(tmp_path, EMBEDDING, more), values)
    after = files(tmp_path)
    assert [name for name in before if after[name] != before[name]] == ["train/embedding/00002.safetensors"]


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=25)
def test_a_file_cut_short_anywhere_is_found(share):
    with tempfile.TemporaryDirectory() as folder:
        write_all(folder, EMBEDDING, ROWS, random_rows(EMBEDDING, ROWS))
        file = Path(folder, "train/embedding/00001.safetensors")
        os.truncate(file, int(share * file.stat().st_size))
        reader = stored(folder, EMBEDDING)
        message = "lacks 1 of the 3 files that are read: 'train/embedding/00001.safetensors' is cut short or damaged; `"
        with pytest.raises(UserError, match=message):
            reader.check()
        assert missing_shards(folder, "train", EMBEDDING, ROWS, KEY) == [1]
        assert reader[0, 3]["embedding"].shape == (3,)
        with pytest.raises(UserError, match=message):
            reader[0, 4]


def test_faults_are_counted_and_each_is_named_once(store):
    for number in (0, 2):
        (store / f"train/logits/0000{number}.safetensors").unlink()
    (store / "train/embedding/00001.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as error:
        stored(store).check()
    assert str(error.value) == (
        f"store {str(store)!r} lacks 3 of the 6 files that are read: 'train/embedding/00001.safetensors' is cut "
        "short or damaged, 'train/logits/00000.safetensors' is missing (as are 1 more); `distill store` with the same "
        "arguments writes what lacks and leaves the rest"
    )
    assert missing_shards(store, "train", LOGITS, ROWS, KEY) == [0, 2]


def test_rows_of_another_key_setting_place_or_type_are_not_taken(store):
    others = {
        "another key": (EMBEDDING, "fedcba9876543210"),
        "another setting": (Quantity("embedding", (3,), torch.float32, {"layer": -2}), KEY),
        "another shape": (Quantity("embedding", (3, 1), torch.float32), KEY),
        "another type": (Quantity("embedding", (3,), torch.float16), KEY),
    }
    for quantity, key in others.values():
        assert missing_shards(store, "train", quantity, ROWS, key) == [0, 1, 2]
        with pytest.raises(UserError, match="is of another teacher, other data or other settings .as are 2 more"):
            stored(store, quantity, key=key).check()
    os.replace(store / "train/embedding/00000.safetensors", store / "train/embedding/00001.safetensors")
    assert missing_shards(store, "train", EMBEDDING, ROWS, KEY) == [0, 1]
    (store / "train").rename(store / "val")
    assert missing_shards(store, "val", LOGITS, ROWS, KEY) == [0, 1, 2]
    assert missing_shards(store, "train", LOGITS, ROWS, KEY) == [0, 1, 2]


def test_equal_settings_are_the_same_quantity_in_any_writing(store):
    same = Quantity("logits", (2, 2), torch.bfloat16, {"temperature": 4})
    assert missing_shards(store, "train", same, ROWS, KEY) == []


def test_rows_that_do_not_fit_the_quantity_are_not_written(tmp_path):
    for wrong in (torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"must have the shape \[N, 3\] and type torch.float32"):
            write_shard(tmp_path, "train", EMBEDDING, 0, wrong, KEY)
    assert not files(tmp_path)


def test_a_view_is_written_without_the_tensor_that_it_shows(tmp_path):
    many = torch.randn(3, 100_000).T.requires_grad_()
    write_shard(tmp_path, "train", EMBEDDING, 0, many[7:11], KEY)
    assert (tmp_path / "train/embedding/00000.safetensors").stat().st_size < 1000
    assert torch.equal(read_all(tmp_path, EMBEDDING, Rows(4, 1, 4)), many[7:11])


def test_a_full_disk_leaves_nothing_new_and_keeps_the_old_file(store):
    before = files(store)
    wide = Quantity("wide", (5000,), torch.float32)
    with files_of_at_most(10_000):
        for quantity in (wide, Quantity("embedding", (5000,), torch.float32)):
            with pytest.raises(
                UserError, match=r"00000.safetensors' \(0.1 MiB\) cannot be written \(File too large\); all"
            ):
                write_shard(store, "train", quantity, 0, torch.zeros(4, 5000), KEY)
    assert files(store) == before


def test_a_folder_without_permission_to_write_is_read_and_not_written(store):
    before = files(store)
    for path in (store, *store.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def use():
        os.chdir(store)
        if os.getuid() == 0:
            os.setuid(65534)  # root writes anywhere
        reader = stored(".")
        reader.check()
        assert reader[1, 4]["logits"].shape == (2, 2)
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            write_shard(".", "train", EMBEDDING, 3, torch.zeros(1, 3), KEY)

    try:
        assert in_a_fork(use) == 0
    finally:
        for path in (store, *store.rglob("*")):
            path.chmod(0o755)
    assert files(store) == before


def test_a_process_killed_while_it_writes_leaves_whole_files_only(tmp_path):
    large = Quantity("large", (500_000,), torch.float32)
    rows = Rows(images=4, draws=1, per_shard=4)
    folder = tmp_path / "train/large"

    def killed_while_writing():
        process = os.fork()
        if process == 0:
            try:
                for value in range(10**6):
                    write_shard(tmp_path, "train", large, 0, torch.full((4, 500_000), float(value)), KEY)
            finally:
                os._exit(1)
        try:
            deadline = time.monotonic() + 10
            while not (folder / "00000.safetensors").exists() or not list(folder.glob("*.part")):
                assert time.monotonic() < deadline, "nothing was written"
                time.sleep(0.0005)
        finally:
            os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        return len(list(folder.glob("*.part"))) == 1

    assert any(killed_while_writing() for _ in range(20)), "no kill fell into a write"
    assert missing_shards(tmp_path, "train", large, rows, KEY) == []
    values = read_all(tmp_path, large, rows)
    assert (values == values[0, 0]).all()
    write_shard(tmp_path, "train", large, 0, torch.zeros(4, 500_000), KEY)
    assert [path.name for path in folder.iterdir()] == ["00000.safetensors"]
    assert (read_all(tmp_path, large, rows) == 0).all()

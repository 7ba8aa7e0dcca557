"""Reading a prepared dataset."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from higgs_tune.data.dataset import Dataset
from higgs_tune.data.shards import list_shards
from higgs_tune.errors import DataError
from tests.unit.data.rows import (
    chat,
    clip,
    make,
)


def test_rows_come_back_as_written(tmp_path: Path):
    rows = [clip(n, ref_text="ref" if n % 3 == 0 else None) for n in range(150)] + [chat(0)]
    dataset = make(tmp_path, rows, rows_per_shard=70)
    assert len(list_shards(tmp_path)) == 3
    for index in [150, 0, 69, 70, 63, 64, 149]:
        found, wanted = dataset.row(index), rows[index]
        for name in ("id", "split", "kind", "speaker", "text", "ref_text", "turns", "start_index"):
            assert getattr(found, name) == getattr(wanted, name)
        assert len(found.codes) == len(wanted.codes)
        for a, b in zip(found.codes, wanted.codes, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == np.uint16


def test_a_dataset_may_have_more_shards_than_files_may_be_open(tmp_path: Path):
    dataset = make(tmp_path, [clip(n) for n in range(300)], rows_per_shard=1)
    code = (
        "import resource, sys; from higgs_tune.data.dataset import Dataset;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150));"
        "dataset = Dataset.open(sys.argv[1]);"
        "assert [dataset.row(n).id for n in range(300)] == [i for i, _ in dataset.texts()]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert dataset.row(299).id == "r299"


def test_few_bytes_of_each_row_stay_in_memory(tmp_path: Path):
    dataset = make(tmp_path, [clip(n, text="long " * 999) for n in range(20)] + [chat(0)])
    assert (dataset.index.itemsize, dataset.sizes(len).itemsize) == (35, 20), "as data.md says"
    arrays = [value for value in vars(dataset).values() if isinstance(value, np.ndarray | list)]
    assert sum(map(len, arrays)) < 30, "rows are in the index only"


def test_a_sentence_has_one_number_however_it_is_written(tmp_path: Path):
    texts = ["كَتَبَ", "كتب.", "  كتـب\u200f", "قرأ"]
    found = make(tmp_path, [clip(n, text=text) for n, text in enumerate(texts)]).index["text"]
    assert found[0] == found[1] == found[2] != found[3]


def test_content_hash_depends_on_codes_but_not_on_shards(tmp_path: Path):
    rows = [clip(n) for n in range(20)]
    one = make(tmp_path / "one", rows).info
    many = make(tmp_path / "many", rows[::-1], rows_per_shard=3).info
    assert one.content_hash == many.content_hash
    rows[7].codes[0][0, 0] = (int(rows[7].codes[0][0, 0]) + 1) % 256
    assert make(tmp_path / "other", rows).info.content_hash != one.content_hash


def test_equal_rows_give_equal_bytes(tmp_path: Path):
    rows = [clip(n) for n in range(20)]
    make(tmp_path / "a", rows)
    make(tmp_path / "b", rows)
    a, b = ([p.read_bytes() for p in list_shards(tmp_path / name)] for name in "ab")
    assert a == b


def test_a_smaller_dataset_replaces_all_shards_of_a_larger_one(tmp_path: Path):
    make(tmp_path, [clip(n) for n in range(20)], rows_per_shard=5)
    assert len(make(tmp_path, [clip(n) for n in range(7)], rows_per_shard=5).index) == 7


def test_the_error_for_a_relative_folder_names_it_in_full(tmp_path: Path, monkeypatch):
    make(tmp_path / "here" / "set", [clip(0), clip(1)])
    monkeypatch.chdir(tmp_path)  # as with a best_config.yaml that was written in here/
    with pytest.raises(DataError, match=rf"no dataset in {tmp_path}/set. Give the folder of one"):
        Dataset.open("set")


def test_the_error_for_a_folder_says_why_it_is_no_dataset(tmp_path: Path):
    with pytest.raises(DataError, match=r"found no dataset\.json, there is no dataset"):
        Dataset.open(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no such embedded dataset"):
        Dataset.open("embedded:klingon")
    make(tmp_path, [clip(0), clip(1)])
    info = tmp_path / "dataset.json"
    good = json.loads(info.read_text())

    def broken(text: str) -> Dataset:
        info.write_text(text)
        return Dataset.open(str(tmp_path))

    with pytest.raises(DataError, match=r"cannot be read as JSON"):
        broken("{")
    with pytest.raises(DataError, match=r"found dataset format 2, needed 1"):
        broken(json.dumps(good | {"format": 2}))
    with pytest.raises(DataError, match=r"fields are missing or unknown"):
        broken(json.dumps({k: v for k, v in good.items() if k != "splits"}))
    with pytest.raises(DataError, match=r"codec\.num_codebooks is 0"):
        broken(json.dumps(good | {"codec": good["codec"] | {"num_codebooks": 0}}))
    with pytest.raises(DataError, match=r"says 3 rows, the shards hold 2"):
        broken(json.dumps(good | {"num_rows": 3}))
    info.unlink()
    with pytest.raises(DataError, match=r"its preparation was not finished"):
        Dataset.open(str(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path):
    make(tmp_path, [clip(0)])
    (shard,) = list_shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataError, match=r"part-00000\.parquet: cannot be read as Parquet"):
        Dataset.open(str(tmp_path))


def test_reading_rows_imports_no_pandas():
    """Importing it takes much of a worker's start; pyarrow's to_numpy would import it."""
    code = (
        "import sys; from higgs_tune.data.dataset import Dataset;"
        "row = Dataset.open('embedded:arabic').row(3);"
        "assert row.codes[0].size and 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tilde_in_a_dataset_path_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path / "mine", [clip(0)])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Dataset.open("~/mine").directory == tmp_path / "mine"

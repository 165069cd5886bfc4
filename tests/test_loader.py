"""The dataloader: rows against the plainest implementation of the packing rules; batches, clock, threads."""

import hashlib
import itertools
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluator_fixtures import make_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_fixtures import environment, load_prepare, plain_rows

import prepare as any_prepare  # for RowStream, which depends on no profile


def rounds(shards, forever):
    """Batches of documents, shard by shard, as often as the stream goes round."""
    for epoch in itertools.count(1) if forever else [1]:
        for shard in shards:
            for batch in shard:
                yield batch, epoch


def shard_of(batches):
    documents = [document for batch in batches for document in batch]
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    return any_prepare.Shard(tokens, lengths, np.array([len(batch) for batch in batches], dtype=np.int64))


LENGTHS = st.one_of(st.integers(1, 12), st.just(1), st.just(5), st.integers(1, 60))
BATCHES = st.lists(st.lists(LENGTHS, min_size=1, max_size=16), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(BATCHES, min_size=1, max_size=3),
    T=st.integers(1, 40),
    buffer_size=st.integers(1, 30),
    forever=st.booleans(),
    takes=st.lists(st.integers(1, 7), min_size=1, max_size=12),
)
def test_rows_equal_the_plain_rules_for_any_lengths(lengths, T, buffer_size, forever, takes):
    ids = itertools.cycle(range(1, 60000))  # documents of distinct tokens
    shards = [[[[0, *itertools.islice(ids, n - 1)] for n in batch] for batch in shard] for shard in lengths]
    plain = plain_rows(rounds(shards, forever), T + 1, buffer_size)
    parts = {str(number): shard_of(shard) for number, shard in enumerate(shards)}
    with patch.multiple(any_prepare, PACKING_BUFFER=buffer_size, _read_shard=lambda path: parts[path.stem]):
        stream = any_prepare.RowStream(list(parts), T, forever)
        for n in takes:
            expected = list(itertools.islice(plain, n))
            assert stream.take(n).tolist() == [row for row, _ in expected]
            assert not expected or stream.epoch == expected[-1][1]


def documents_on_disk(evaluator, name):
    """Batches of encoded documents of one shard, by the rules, from the parquet file."""
    tokenizer = evaluator.Tokenizer.from_directory()
    parquet = pq.ParquetFile(evaluator.CACHE / "text" / f"{name}.parquet")
    for group in range(parquet.num_row_groups):
        texts = parquet.read_row_group(group)["text"].to_pylist()
        for i in range(0, len(texts), 128):
            yield tokenizer.encode(texts[i : i + 128], prepend=tokenizer.get_bos_token_id())


TRAINING_ROWS = {42: "46f7a227acab013e", 7: "cb2f59d021d25f53"}  # by seed, of 200 rows of 65 tokens


def test_digest_and_first_rows_are_those_of_commit_a6048a1_so_that_scores_of_that_time_still_compare(tiny):
    """Printed by that commit's prepare.py, before it was rewritten; its rows equal those of karpathy's."""
    for seed, training_rows in TRAINING_ROWS.items():
        evaluator = load_prepare(tiny[0], "tiny", tiny[1], seed)
        rows = [evaluator._open_split(split, 64).take(200) for split in ("train", "val", "test")]
        found = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16] for part in rows]
        assert found == [training_rows, "d80112b3ca60be0b", "f22637bb69303d6b"]
    digest = "785becde39fd9b7ad48392a6d08af4a0e1c59c6b231e65273989f4ec48d01326"  # tokenizer, tokens, held-out rows
    assert evaluator.describe()["digest"] == digest


@pytest.mark.parametrize(("B", "T", "split"), [(64, 7, "val"), (3, 200, "test"), (5, 32, "train"), (64, 200, "train")])
def test_batches_equal_the_plain_rules_from_parquet(evaluator, B, T, split):
    forever = split == "train"
    names = [f"train_{i:05d}" for i in range(evaluator.TRAIN_SHARDS)] if forever else [split]
    shards = [list(documents_on_disk(evaluator, name)) for name in names]
    wanted = 15 * B if forever else None  # of 200 tokens: more rows than a pass has
    expected = list(itertools.islice(plain_rows(rounds(shards, forever), T + 1), wanted))
    assert T != 200 or not forever or expected[-1][1] == 2  # the comparison goes round
    loader = make_loader(evaluator, split, B, T)
    for start in range(0, len(expected), B):
        x, y, epoch = next(loader)
        part = expected[start : start + B]
        rows = torch.tensor([row for row, _ in part])
        assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
        assert torch.equal(x, rows[:, :-1]) and torch.equal(y, rows[:, 1:])
        assert epoch == part[-1][1]
    assert split == "train" or next(loader, None) is None
    loader.close()


def test_second_run_on_a_device_waits_says_so_and_is_not_charged_for_it(evaluator, tmp_path):
    """The child's clock shows 1 as soon as `late` exists, which is before it gets the lock."""
    late = tmp_path / "late"
    evaluator.hold_device(torch.device("cpu"))  # as before a warm-up; the loader takes no second lock
    loader = make_loader(evaluator)
    next(loader)
    code = (
        "import os, sys; sys.path.insert(0, os.path.dirname(sys.argv[1])); import prepare\n"
        "prepare._now = lambda: float(os.path.exists(sys.argv[2]))\n"
        "next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 2, 32, 'train', device='cpu'))\n"
        "print('trained for', prepare.training_seconds())"
    )
    command = [sys.executable, "-c", code, evaluator.__file__, str(late)]
    child = subprocess.Popen(command, env=environment(evaluator), stdout=-1, stderr=-1, text=True)
    waiting = child.stderr.readline()
    late.touch()
    evaluator._stopwatch.lock.close()  # as the end of this process would
    out, err = child.communicate(timeout=60)
    assert waiting == f"waiting: another run holds cpu (lock {evaluator.LOCKS}/cpu.lock)\n"
    assert (out, err, child.returncode) == ("trained for 0.0\n", "", 0)
    loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_survive_a_slow_device(evaluator):
    """A busy GPU must not see a batch overwritten while its copy waits."""
    loader = evaluator.make_dataloader(evaluator.Tokenizer.from_directory(), 64, 32, "train", device="cuda")
    plain = evaluator._open_split("train", 32)
    busy = torch.randn(8192, 8192, device="cuda")
    batches = []
    for _ in range(40):
        for _ in range(4):
            busy = busy @ busy * 1e-4
        batches.append(next(loader)[0])
    for x in batches:
        assert np.array_equal(x.cpu().numpy(), plain.take(64)[:, :-1])
    loader.close()

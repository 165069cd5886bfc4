"""Rows and digests are those of commit a6048a1, to the byte: scores of that time still compare.

Run: uv run pytest tests/test_prepare_figures.py

The constants were printed by that commit's prepare.py, before it was rewritten; its rows equal those of karpathy's.
"tiny" is the profile of prepare_fixtures.py, the same on every machine; "smoke" reads torch 2.11.0's files.
"""

import hashlib

import pytest
import torch
from prepare_fixtures import PREPARE, load_prepare

DIGESTS = {  # of tokenizer, tokens and rows of the held-out splits
    "tiny": "785becde39fd9b7ad48392a6d08af4a0e1c59c6b231e65273989f4ec48d01326",
    "smoke": "6d9a8577d1f7826e5d6159f8f087622d420984f40a771e3ce4f6f7c4123c59dc",
}
HELD_OUT_ROWS = ["d80112b3ca60be0b", "f22637bb69303d6b"]  # val, test: SHA-256, 16 digits, of 200 rows of 65 tokens
TRAINING_ROWS = {42: "46f7a227acab013e", 7: "cb2f59d021d25f53"}  # by seed


@pytest.mark.parametrize("profile", DIGESTS)
def test_digest_is_what_it_was(tiny, tmp_path, profile):
    if profile == "smoke" and torch.__version__.split("+")[0] != "2.11.0":
        pytest.skip("the text is that of torch 2.11.0")
    path, cache = tiny if profile == "tiny" else (PREPARE, tmp_path)
    evaluator = load_prepare(path, profile, cache)
    assert evaluator.main([]) == 0
    assert evaluator.describe()["digest"] == DIGESTS[profile]


@pytest.mark.parametrize("seed", TRAINING_ROWS)
def test_first_rows_of_every_split_are_what_they_were_for_any_seed(tiny, seed):
    evaluator = load_prepare(tiny[0], "tiny", tiny[1], seed)
    rows = [evaluator._open_split(split, 64).take(200) for split in ("train", "val", "test")]
    found = [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16] for part in rows]
    assert found == [TRAINING_ROWS[seed], *HELD_OUT_ROWS]

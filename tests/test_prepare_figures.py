"""Rows, tokens, tokenizer files, digests and scores are those of commit a6048a1, to the byte.

Run: uv run pytest tests/test_prepare_figures.py

The constants were printed by that commit's prepare.py, before it was rewritten; its rows equal those of karpathy's.
"tiny" is the profile of prepare_fixtures.py, the same on every machine; "smoke" reads torch 2.11.0's files.
"""

import hashlib

import pytest
import torch
from prepare_fixtures import PREPARE, load_prepare

FIGURES = {  # digest, SHA-256 of the list of all token files and their SHA-256, bpb of the fixed model on both splits
    "tiny": (
        "785becde39fd9b7ad48392a6d08af4a0e1c59c6b231e65273989f4ec48d01326",
        "f5598e03d6b5d72ae15cfe9c89c5beb8990e8da8b151b32a8e2bb03bc6cd20b8",
        (4.743512172853695, 4.774370194522888),
    ),
    "smoke": (
        "6d9a8577d1f7826e5d6159f8f087622d420984f40a771e3ce4f6f7c4123c59dc",
        "0498a40ac225489ffcf6a1c27e3566c43c258a3e2bf5fc4d7a013da2b3546d10",
        (6.453365609023646, 6.447917345799104),
    ),
}
HELD_OUT_ROWS = ["d80112b3ca60be0b", "f22637bb69303d6b"]  # val, test: SHA-256, 16 digits, of 200 rows of 65 tokens
TRAINING_ROWS = {42: "46f7a227acab013e", 7: "cb2f59d021d25f53"}  # by seed


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("profile", FIGURES)
def test_digest_token_files_and_scores_are_what_they_were(tiny, tmp_path, profile):
    if profile == "smoke" and torch.__version__.split("+")[0] != "2.11.0":
        pytest.skip("the text is that of torch 2.11.0")
    path, cache = tiny if profile == "tiny" else (PREPARE, tmp_path)
    evaluator = load_prepare(path, profile, cache)
    assert evaluator.main([]) == 0
    digest, files, scores = FIGURES[profile]
    assert evaluator.describe()["digest"] == digest
    tokens = sorted(f"tokens/{path.name}" for path in (evaluator.CACHE / "tokens").iterdir())
    names = ["tokenizer.tiktoken", "tokenizer.json", *tokens]
    listing = "".join(f"{name} {sha256((evaluator.CACHE / name).read_bytes())}\n" for name in names)
    assert sha256(listing.encode()) == files

    ids = torch.arange(evaluator.VOCAB_SIZE, dtype=torch.float64)
    bigrams = (4 * torch.sin(0.37 * ids[:, None] + 1.3 * ids)).float()

    def model(idx):
        return bigrams[idx]

    rows = evaluator.describe()["rows"]["test"]
    val = evaluator.evaluate_bpb(model, evaluator.Tokenizer.from_directory(), 32)
    test = evaluator._score(model, "test", rows, 32, torch.device("cpu"))["test_bpb"]
    assert (val, test) == pytest.approx(scores, abs=1e-6)


@pytest.mark.parametrize("seed", TRAINING_ROWS)
def test_first_rows_of_every_split_are_what_they_were_for_any_seed(tiny, seed):
    evaluator = load_prepare(tiny[0], "tiny", tiny[1], seed)
    rows = [evaluator._open_split(split, 64).take(200) for split in ("train", "val", "test")]
    assert [sha256(part.astype("<i8").tobytes())[:16] for part in rows] == [TRAINING_ROWS[seed], *HELD_OUT_ROWS]

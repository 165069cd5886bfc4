"""prepare.py: the judge. Constants, data, tokenizer, dataloader and evaluator. Frozen: nobody edits it during research.

    uv run prepare.py                     # prepare the profile's data, once; running it again resumes or does nothing
    uv run prepare.py --num-shards 100    # more training shards (-1: all); what is there already stays
    uv run prepare.py --verify            # recompute the digests of everything that the metric depends on

The profile is chosen by AUTORESEARCH_PROFILE, the cache's place by AUTORESEARCH_CACHE. One folder a profile:

    download/              parquet files of a Hugging Face data set that has no splits of its own
    text/*.parquet         documents, one file a shard, in a column "text"
    tokenizer.tiktoken     ranks, one "base64 rank" a line; tokenizer.json: split pattern and special tokens
    tokens/*.tokens        the same shards as uint16 tokens; val.tokens and test.tokens are what is scored
    manifest.json          written last: constants, row counts, SHA-256. No manifest, not prepared.

Data flows through this file from top to bottom: profiles, errors, download, splits, tokenizer, tokens, manifest, packing,
dataloader, stopwatch, evaluator. Shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

import argparse
import base64
import bisect
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

# requests, pyarrow, rustbpe and tqdm are imported where they are used: train.py needs none of them and starts sooner.

# ---------------------------------------------------------------------------------------------------------------------
# Profiles: the same code from a data-centre GPU to a laptop
# ---------------------------------------------------------------------------------------------------------------------


class Profile(NamedTuple):
    """One row of constants. Your own data is one more row in PROFILES."""

    source: str  # Hugging Face data set id; a file or folder of .parquet, .jsonl, .txt, .md; or python:stdlib, python:all
    max_seq_len: int  # tokens, a row
    time_budget: float  # seconds, of training
    eval_tokens: int  # tokens, scored (fewer where the validation split is smaller)
    vocab_size: int  # tokens, 4 of them special; at most 65536
    hub_shards: int = 0  # shards of a data set named shard_00000.parquet and so on, last two test and validation; 0: listed
    max_chars: float = math.inf  # characters, read of a local source


PROFILES = {
    "climbmix": Profile("karpathy/climbmix-400b-shuffle", 2048, 300.0, 40 * 524288, 8192, hub_shards=6543),
    "code": Profile("python:all", 2048, 300.0, 40 * 524288, 8192),
    "pocket": Profile("python:stdlib", 256, 30.0, 2**16, 2048),
    "smoke": Profile("python:stdlib", 64, 2.0, 2**13, 512, max_chars=2e6),
}


def _choose_profile() -> tuple[str, str, int]:
    """Returns profile, why it was chosen, and seed, from the environment. Exits with code 2 on a bad value."""
    profile, reason = os.environ.get("AUTORESEARCH_PROFILE"), "AUTORESEARCH_PROFILE"
    if not profile and torch.cuda.device_count() > 0:  # counts without starting CUDA
        profile, reason = "climbmix", "default with a CUDA device"
    elif not profile:
        profile, reason = "pocket", "default without a CUDA device"
    seed = os.environ.get("AUTORESEARCH_SEED") or "42"
    problem = None
    if profile not in PROFILES:
        problem = f"AUTORESEARCH_PROFILE is {profile!r}: use one of {', '.join(PROFILES)}"
    elif not re.fullmatch(r"[0-9]{1,9}", seed):
        problem = f"AUTORESEARCH_SEED is {seed!r}: use a whole number from 0 to 999999999"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    return profile, reason, int(seed)


PROFILE, PROFILE_REASON, SEED = _choose_profile()
SOURCE, MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE, HUB_SHARDS, MAX_CHARS = PROFILES[PROFILE]

CACHE_ROOT = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
CACHE = CACHE_ROOT / PROFILE

MIN_ROWS = 64  # rows, the least that a split must give
SPLIT_SHARDS = 8  # training shards, written for every buffer of a local source (a seed starts at a shard)
SPLIT_BUFFER_CHARS = 2**26  # characters, shuffled together when a local source is split
TOKENIZER_MAX_CHARS = 10**9  # characters, the tokenizer is trained on
TOKENIZER_DOC_CHARS = 10_000  # characters, of one document in it
ENCODE_CHUNK_CHARS = 100_000  # characters, handed to tiktoken at once (its regex overflows on a million spaces)
DOCUMENT_BATCH = 128  # documents, at most, that enter the packing buffer at once
LOW_32_BITS = 2**32 - 1
PACKING_BUFFER = 1000  # documents, below which the buffer is refilled
NUM_SPECIAL_TOKENS = 4
BOS_ID = VOCAB_SIZE - NUM_SPECIAL_TOKENS  # <|reserved_0|>
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
DOWNLOAD_ATTEMPTS = 6  # times, a shard is asked for
BACKOFF_SECONDS = 1.0  # seconds, before the second attempt; doubles
CONNECT_SECONDS, STALL_SECONDS = 10, 30  # seconds, without a connection or a byte, before an attempt is given up


class UserError(Exception):
    """Something that a person can mend: the message says what, the value received and what to do next."""


class EvaluationRefused(RuntimeError):
    """The judge does not score this model or this run; the message gives the reason and the figures."""


class BudgetExceeded(EvaluationRefused):
    """The run trained longer than TIME_BUDGET allows."""


class NotCausal(EvaluationRefused):
    """Logits depend on later tokens, on other rows, on chance or on what was evaluated before."""


def _progress(iterable=None, **options):
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10  # seconds: a log file wants few lines
    return tqdm(iterable, mininterval=interval, dynamic_ncols=True, **options)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextlib.contextmanager
def _locked(path: Path, waiting: str):
    """Holds an exclusive flock on `path`; prints `waiting` once if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Sources: documents from a local file or folder, split by their SHA-256
# ---------------------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path):
    """A ParquetFile with a text column; UserError naming the file otherwise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(path)
        kind = parquet.schema_arrow.field("text").type
    except (pa.ArrowException, KeyError, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file with a text column ({error}): delete it, try again") from error
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: its text column holds {kind}, not strings: give another file")
    return parquet


def _document_batches(path: Path):
    """Yields lists of at most DOCUMENT_BATCH documents, row group by row group. A null counts as an empty document."""
    import pyarrow as pa

    parquet = _open_parquet(path)
    for group in range(parquet.num_row_groups):
        for batch in parquet.iter_batches(DOCUMENT_BATCH, row_groups=[group], columns=["text"], use_threads=False):
            # As bytes: a string column may hold what is not UTF-8, and pyarrow does not check.
            column = batch.column(0)
            as_bytes = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
            yield [(text or b"").decode("utf-8", "replace") for text in as_bytes.to_pylist()]


def _source_files(source: str) -> list[Path]:
    """The files of a local source, in the order of their paths."""
    if source.startswith("python:"):
        paths = sysconfig.get_paths()
        stdlib = Path(paths["stdlib"])
        files = {f for f in stdlib.rglob("*.py") if not {"site-packages", "dist-packages"} & {*f.parts}}
        if source == "python:all":
            files |= {f for key in ("purelib", "platlib") for f in Path(paths[key]).rglob("*.py")}
        return sorted(files)
    path = Path(source).expanduser()
    suffixes = (".parquet", ".jsonl", ".txt", ".md")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [f for f in files if f.suffix in suffixes and f.is_file()]
    if not files:
        raise UserError(f"{path} holds no {', '.join(suffixes)} file: give the profile another source")
    return files


def _read_documents(files: list[Path]):
    """Yields every document of local files; empty ones are left out."""
    for path in _progress(files, desc="read", unit="file"):
        if path.suffix == ".parquet":
            documents = itertools.chain.from_iterable(_document_batches(path))
        elif path.suffix == ".jsonl":
            documents = _read_jsonl(path)
        else:
            documents = [path.read_bytes().decode("utf-8", "replace")]
        yield from filter(None, documents)


def _read_jsonl(path: Path):
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str | None):
                    raise TypeError(f"text is {text!r:.40}")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number} is not a JSON object with a text field ({error}): mend the line") from error
            yield _well_formed(text or "")


def _well_formed(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which no UTF-8 can hold, by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _split_of(document: str) -> str:
    number = int(hashlib.sha256(document.encode("utf-8")).hexdigest(), 16) % 20
    return {0: "val", 1: "test"}.get(number, "train")


def _cut(document: str, limit: int):
    """Yields pieces of at most `limit` characters, cut at line ends; a longer line is cut hard."""
    start = 0
    while len(document) - start > limit:
        end = document.rfind("\n", start, start + limit) + 1 or start + limit
        yield document[start:end]
        start = end
    yield document[start:]


def _split_documents(documents, folder: Path) -> None:
    """Writes folder/{train_NNNNN,val,test}.parquet: each document in one split, cut into pieces, shuffled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    part = folder.with_name("text.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    schema = pa.schema([("text", pa.string())])
    shuffle, train_shards, chars = random.Random(42), 0, 0
    pending = {"train": [], "val": [], "test": []}
    with contextlib.ExitStack() as writers:
        held_out = {
            split: writers.enter_context(pq.ParquetWriter(part / f"{split}.parquet", schema)) for split in ("val", "test")
        }

        def flush():
            nonlocal train_shards
            for split, pieces in pending.items():
                shuffle.shuffle(pieces)
                if split != "train" and pieces:
                    held_out[split].write_table(pa.table({"text": pieces}, schema), row_group_size=1024)
            for shard in filter(None, (pending["train"][i::SPLIT_SHARDS] for i in range(SPLIT_SHARDS))):
                pq.write_table(pa.table({"text": shard}, schema), part / f"train_{train_shards:05d}.parquet", row_group_size=1024)
                train_shards += 1
            for pieces in pending.values():
                pieces.clear()

        buffered = 0
        for document in documents:
            pending[_split_of(document)].extend(_cut(document, 2 * MAX_SEQ_LEN))
            chars, buffered = chars + len(document), buffered + len(document)
            if buffered >= SPLIT_BUFFER_CHARS:
                flush()
                buffered = 0
            if chars >= MAX_CHARS:
                break
        flush()
    os.replace(part, folder)


# ---------------------------------------------------------------------------------------------------------------------
# Texts: parquet shards of the three splits
# ---------------------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """The parquet shards of the three splits."""

    train: list[Path]
    val: Path
    test: Path


def _collect_texts(num_shards: int, workers: int) -> Texts:
    folder = CACHE / "text"
    if not folder.exists():
        _split_documents(_read_documents(_source_files(SOURCE)), folder)
    return Texts(sorted(folder.glob("train_*.parquet")), folder / "val.parquet", folder / "test.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Byte-pair encoding with VOCAB_SIZE tokens, the last four special; <|reserved_0|> is BOS."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding

    @classmethod
    def from_directory(cls, directory: Path | None = None) -> "Tokenizer":
        """Reads tokenizer.tiktoken and tokenizer.json from `directory` (default: the profile's cache). UserError if absent."""
        directory = Path(directory or CACHE)
        try:
            lines = (directory / "tokenizer.tiktoken").read_bytes().splitlines()
            ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
            meta = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
            return cls(
                tiktoken.Encoding(
                    "autoresearch",
                    pat_str=meta["pattern"],
                    mergeable_ranks=ranks,
                    special_tokens=meta["special_tokens"],
                    explicit_n_vocab=len(ranks) + len(meta["special_tokens"]),
                )
            )
        except FileNotFoundError as error:
            raise UserError(_not_prepared(error.filename)) from error

    def get_vocab_size(self) -> int:
        return self._encoding.n_vocab

    def get_bos_token_id(self) -> int:
        return self._encoding.encode_single_token("<|reserved_0|>")

    def encode(self, text: str | list[str], prepend: int | str | None = None) -> list:
        """Token ids of a text, or a list of them for a list of texts. Special-token strings in a text are ordinary text.

        prepend: a token id, or the name of a special token, that goes before each text's tokens.
        """
        if not isinstance(text, str):
            return [self.encode(one, prepend) for one in text]
        if isinstance(prepend, str):
            prepend = self._encoding.encode_single_token(prepend)
        return ([] if prepend is None else [prepend]) + self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of one text as uint32. Works without the interpreter lock, so threads use all cores."""
        try:
            chunks = [self._encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in _encode_chunks(text)]
        except UnicodeEncodeError:
            return self.encode_array(_well_formed(text))
        return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)

    def decode(self, ids) -> str:
        return self._encoding.decode(list(ids))

    def token_lengths(self) -> np.ndarray:
        """Raw byte length of every token, int32 (V,), 0 for special tokens."""
        special = self._encoding.special_tokens_set
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.get_vocab_size())]
        for name in special:
            lengths[self._encoding.encode_single_token(name)] = 0
        return np.array(lengths, dtype=np.int32)


def _encode_chunks(text: str):
    """Yields a long text in chunks, cut where a line begins without white space: no token crosses such a place."""
    start = 0
    while len(text) - start > ENCODE_CHUNK_CHARS:
        end = start + ENCODE_CHUNK_CHARS
        cut = text.rfind("\n", start, end) + 1
        while cut and text[cut].isspace():
            cut = text.rfind("\n", start, cut - 1) + 1
        end = cut or end  # no such place: cut hard
        yield text[start:end]
        start = end
    yield text[start:]


def get_token_bytes(device="cpu") -> torch.Tensor:
    """Raw byte length of each token, int32 (V,), 0 for special tokens; read from disk at every call."""
    return torch.from_numpy(Tokenizer.from_directory().token_lengths()).to(device)


def _train_tokenizer(shards: list[Path]) -> None:
    """Trains on the training split and writes tokenizer.tiktoken and tokenizer.json."""
    import rustbpe

    def texts():
        left = TOKENIZER_MAX_CHARS
        for path in _progress(shards, desc="tokenizer", unit="shard"):
            for document in itertools.chain.from_iterable(_document_batches(path)):
                yield document[: min(left, TOKENIZER_DOC_CHARS)]
                left -= min(left, TOKENIZER_DOC_CHARS, len(document))
                if left == 0:
                    return

    shutil.rmtree(CACHE / "tokens", ignore_errors=True)  # made with another tokenizer
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts(), BOS_ID, pattern=SPLIT_PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    if len(ranks) != BOS_ID:
        raise UserError(f"the text is too short for {VOCAB_SIZE} tokens ({len(ranks)} found): give {SOURCE} more text")
    special = {f"<|reserved_{i}|>": BOS_ID + i for i in range(NUM_SPECIAL_TOKENS)}
    meta = {"pattern": SPLIT_PATTERN, "special_tokens": special}
    _write_atomically(CACHE / "tokenizer.json", json.dumps(meta, indent=1) + "\n")
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks]
    _write_atomically(CACHE / "tokenizer.tiktoken", "".join(lines))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens: one file a shard. uint16 tokens, padded to 8 bytes; then int64: length of each document (BOS counted), documents
# of each batch, and the three counts (tokens, documents, batches). The counts come last, as they are known last.
# ---------------------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """A tokenized shard, memory-mapped."""

    tokens: np.ndarray  # uint16, BOS + document, one after another
    lengths: np.ndarray  # int64, of each document
    batches: np.ndarray  # int64, documents in each batch


def _read_tokens(path: Path) -> Tokens:
    try:
        raw = np.asarray(np.memmap(path, np.uint8, "r"))
        counts = raw[-24:].view(np.int64)
        num_tokens, num_documents, num_batches = counts.tolist()
        body = (2 * num_tokens + 7) // 8 * 8
        if len(raw) != body + 8 * (num_documents + num_batches + 3):
            raise ValueError(f"{len(raw)} bytes for {num_tokens} tokens in {num_documents} documents")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a token file ({error}): delete it and run 'uv run prepare.py'") from error
    index = raw[body:].view(np.int64)
    return Tokens(raw[: 2 * num_tokens].view(np.uint16), index[:num_documents], index[num_documents:-3])


def _tokenize_shard(text: Path, path: Path, tokenizer: Tokenizer, pool: ThreadPoolExecutor, threads: int, bar) -> None:
    """Writes `path` from a parquet shard, batches encoded in parallel and written in order."""

    def encode(documents):
        arrays = [tokenizer.encode_array(document).astype(np.uint16) for document in documents]
        bos = np.array([BOS_ID], dtype=np.uint16)
        return [len(array) + 1 for array in arrays], np.concatenate([part for array in arrays for part in (bos, array)])

    lengths, batches, num_tokens = [], [], 0
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        for batch_lengths, tokens in _in_order(pool, encode, _document_batches(text), 2 * threads):
            tokens.tofile(file)
            lengths += batch_lengths
            batches.append(len(batch_lengths))
            num_tokens += len(tokens)
            bar.update(len(batch_lengths))
        file.write(bytes(-file.tell() % 8))
        np.array([*lengths, *batches, num_tokens, len(lengths), len(batches)], dtype=np.int64).tofile(file)
    os.replace(part, path)


def _in_order(pool: ThreadPoolExecutor, function, items, in_flight: int):
    """pool.map with at most `in_flight` items waiting, so that memory stays bounded."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _tokenize(texts: Texts) -> list[Path]:
    """Tokenizes what is not yet tokenized; returns the training shards' token files."""
    folder = CACHE / "tokens"
    folder.mkdir(exist_ok=True)
    targets = {folder / f"{text.stem}.tokens": text for text in texts.train}
    todo = {path: text for path, text in targets.items() if not path.exists()}
    todo |= {folder / f"{s}.tokens": getattr(texts, s) for s in ("val", "test") if not (folder / f"{s}.tokens").exists()}
    if todo:
        tokenizer, threads = Tokenizer.from_directory(), os.cpu_count() or 1
        documents = sum(_open_parquet(text).metadata.num_rows for text in todo.values())
        with ThreadPoolExecutor(threads) as pool, _progress(total=documents, desc="tokens", unit="doc") as bar:
            for path, text in todo.items():
                _tokenize_shard(text, path, tokenizer, pool, threads, bar)
    return list(targets)


# ---------------------------------------------------------------------------------------------------------------------
# Manifest
# ---------------------------------------------------------------------------------------------------------------------

METRIC_FILES = ("tokenizer.tiktoken", "tokenizer.json", "tokens/val.tokens", "tokens/test.tokens")


def _not_prepared(missing) -> str:
    return f"profile '{PROFILE}' is not prepared (no {missing}): run 'uv run prepare.py'"


def _constants() -> dict:
    return {
        "source": SOURCE,
        "max_seq_len": MAX_SEQ_LEN,
        "time_budget": TIME_BUDGET,
        "eval_tokens": EVAL_TOKENS,
        "vocab_size": VOCAB_SIZE,
    }


def _load_manifest() -> dict:
    """The manifest; UserError if there is none or it was made with other constants."""
    path = CACHE / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(_not_prepared(path)) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): delete it and run 'uv run prepare.py'") from error
    for name, now in _constants().items():
        if manifest["metric"]["constants"][name] != now:
            was = manifest["metric"]["constants"][name]
            raise UserError(f"{path} was made with {name} {was!r}, now {now!r}: run 'uv run prepare.py'")
    return manifest


def _digest(manifest: dict) -> str:
    """Hex SHA-256 of what the metric depends on: profile, constants, row counts, files. Training shards do not count."""
    return hashlib.sha256(json.dumps(manifest["metric"], sort_keys=True).encode()).hexdigest()


def _check_files(manifest: dict) -> dict[str, str]:
    """SHA-256 of each metric file, recomputed; UserError naming the first that changed."""
    digests = {}
    for name, was in manifest["metric"]["files"].items():
        path = CACHE / name
        if not path.exists():
            raise UserError(f"{path} is missing: delete {CACHE} and run 'uv run prepare.py'")
        digests[name] = _sha256(path)
        if digests[name] != was["sha256"]:
            raise UserError(
                f"{path} changed since it was prepared (SHA-256 {digests[name][:12]}…, was {was['sha256'][:12]}…): "
                f"delete {CACHE} and run 'uv run prepare.py'"
            )
    return digests


def _count_rows(paths: list[Path], most: int) -> int:
    stream = RowStream([_read_tokens(path) for path in paths], MAX_SEQ_LEN, forever=False)
    rows = 0
    while rows < most and (taken := len(stream.take(min(256, most - rows)))):
        rows += taken
    return rows


def _write_manifest(train: list[Path]) -> dict:
    held_out = {"val": [CACHE / "tokens/val.tokens"], "test": [CACHE / "tokens/test.tokens"]}
    want = max(EVAL_TOKENS // MAX_SEQ_LEN, 1)
    rows = {split: _count_rows(paths, max(want, MIN_ROWS)) for split, paths in held_out.items()}
    for split, count in {**rows, "train": _count_rows(train, MIN_ROWS)}.items():
        if count < MIN_ROWS:
            raise UserError(f"split {split!r} gives {count} rows of {MAX_SEQ_LEN} tokens, {MIN_ROWS} are needed")
    files = {name: {"bytes": (CACHE / name).stat().st_size, "sha256": _sha256(CACHE / name)} for name in METRIC_FILES}
    for name in METRIC_FILES:
        (CACHE / name).chmod(0o444)
    metric = {
        "profile": PROFILE,
        "constants": _constants(),
        "rows": {split: min(count, want) for split, count in rows.items()},
        "files": files,
    }
    shards = [{"file": f"tokens/{path.name}", "tokens": len(_read_tokens(path).tokens)} for path in train]
    manifest = {"metric": metric, "train": shards}
    _write_atomically(CACHE / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Packing: the rows, exactly
# ---------------------------------------------------------------------------------------------------------------------


class RowStream:
    """Best-fit packing of documents into rows of T + 1 places; every row is full and starts with BOS.

    The longest document that fits the places left is picked (of equal ones, the one that came first); if none fits, the
    shortest is (of equal ones, the one that came first), cropped to the places left, its tail dropped. Before each pick
    the buffer is refilled, a batch at a time, while it holds fewer than PACKING_BUFFER documents.

    A document in the buffer is one integer, its length above, its arrival counted down below, in a sorted list: the pick
    is one bisection, and the larger key among equal lengths is the earlier document.
    """

    def __init__(self, shards: list[Tokens], T: int, forever: bool, first: int = 0):
        self.epoch = 1  # of the newest document in the buffer
        self._width = T + 1
        self._arrival = LOW_32_BITS  # counts down
        self._keys: list[int] = []
        self._where: dict[int, tuple[np.ndarray, int]] = {}  # key -> (tokens of its shard, start)
        self._batches = self._batches_of(shards[first:] + shards[:first], forever)

    def _batches_of(self, shards, forever):
        for epoch in itertools.count(1) if forever else (1,):
            for shard in shards:
                ends = np.cumsum(shard.lengths)
                starts, last = ends - shard.lengths, np.cumsum(shard.batches)
                for a, b in zip(last - shard.batches, last, strict=True):
                    yield epoch, shard.tokens, shard.lengths[a:b], starts[a:b]

    def _refill(self) -> None:
        for epoch, tokens, lengths, starts in self._batches:
            self.epoch = epoch
            keys = ((lengths << 32) + np.arange(self._arrival, self._arrival - len(lengths), -1)).tolist()
            self._arrival -= len(lengths)
            self._where.update(zip(keys, zip(itertools.repeat(tokens), starts.tolist()), strict=False))
            self._keys += keys
            if len(self._keys) >= PACKING_BUFFER:
                break
        self._keys.sort()

    def take(self, rows: int) -> np.ndarray:
        """The next rows, int64 (rows, T + 1); fewer once a validation or test stream has run out."""
        keys, where, parts, full = self._keys, self._where, [], 0
        while full < rows:
            left, row_start = self._width, len(parts)
            while left:
                if len(keys) < PACKING_BUFFER:
                    self._refill()
                if not keys:  # drained: what is left does not fill a row
                    del parts[row_start:]
                    rows = full
                    break
                at = bisect.bisect(keys, left << 32 | LOW_32_BITS) - 1
                if at < 0:
                    at = bisect.bisect(keys, keys[0] | LOW_32_BITS) - 1
                key = keys.pop(at)
                tokens, start = where.pop(key)
                length = min(key >> 32, left)
                parts.append(tokens[start : start + length])
                left -= length
            else:
                full += 1
        rows_BT1 = np.empty((full, self._width), dtype=np.int64)
        if full:
            np.concatenate(parts, out=rows_BT1.reshape(-1))
        return rows_BT1


def _open_split(split: str, T: int) -> RowStream:
    manifest = _load_manifest()
    if split != "train":
        return RowStream([_read_tokens(CACHE / f"tokens/{split}.tokens")], T, forever=False)
    shards = [_read_tokens(CACHE / shard["file"]) for shard in manifest["train"]]
    first = 0 if SEED == 42 or len(shards) == 1 else 1 + SEED % (len(shards) - 1)
    return RowStream(shards, T, forever=True, first=first)


# ---------------------------------------------------------------------------------------------------------------------
# Dataloader
# ---------------------------------------------------------------------------------------------------------------------

LOADER_SLOTS = 4  # batches, of pinned memory that the copies to a GPU start from


def default_device() -> str:
    """"cuda" where there is one, else "mps", else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def make_dataloader(tokenizer: Tokenizer, B: int, T: int, split: str, device=None):
    """Yields (x, y, epoch): int64 (B, T) on the device, y shifted by one, epoch counted from 1.

    split: "train" goes round for ever, from a shard that AUTORESEARCH_SEED chooses; "val" and "test" end after one pass,
    with a shorter last batch. The rows are RowStream's, whatever B is. The first batch of any split starts the run's
    clock. Tensors are fresh at every step, so they may be kept.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is {split!r}: use train, val or test")
    if B < 1 or T < 1:
        raise ValueError(f"B is {B} and T is {T}: both are at least 1")
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the profile {VOCAB_SIZE}")
    return _load_batches(_open_split(split, T), B, T, torch.device(device or default_device()))


def _load_batches(stream: RowStream, B: int, T: int, device: torch.device):
    """A background thread packs one batch ahead into the next slot, once the copy out of that slot has completed."""
    cuda = device.type == "cuda"
    slots = [torch.empty((B, T + 1), dtype=torch.int64, pin_memory=cuda) for _ in range(LOADER_SLOTS)]
    copied = [torch.cuda.Event() if cuda else None for _ in slots]

    def pack(slot):
        if cuda:
            copied[slot].synchronize()
        rows = stream.take(B)
        slots[slot][: len(rows)] = torch.from_numpy(rows)
        return len(rows), stream.epoch

    with ThreadPoolExecutor(1, "loader") as worker:
        ahead = worker.submit(pack, 0)
        for slot in itertools.cycle(range(LOADER_SLOTS)):
            num_rows, epoch = ahead.result()
            if num_rows == 0:
                return
            ahead = worker.submit(pack, (slot + 1) % LOADER_SLOTS)
            rows = slots[slot][:num_rows].to(device, non_blocking=True)
            if cuda:
                copied[slot].record()
            x, y = rows[:, :-1].clone(memory_format=torch.contiguous_format), rows[:, 1:].clone(memory_format=torch.contiguous_format)
            _stopwatch.start(device)
            yield x, y, epoch


# ---------------------------------------------------------------------------------------------------------------------
# Stopwatch: the run's only clock, and the lock on its device
# ---------------------------------------------------------------------------------------------------------------------

_now = time.perf_counter  # tests put another clock here


def _lock_path(device: torch.device) -> Path:
    name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
    return CACHE_ROOT / "locks" / f"{name}.lock"


class _Stopwatch:
    """Starts with the first batch handed out, stops where the evaluation that gave a score began."""

    def __init__(self):
        self.started = self.stopped = None  # seconds, on _now's clock
        self._lock = contextlib.ExitStack()  # held until the process ends

    def start(self, device: torch.device) -> None:
        if self.started is None:
            path = _lock_path(device)
            self._lock.enter_context(_locked(path, f"waiting: another run holds {device} (lock {path})"))
            self.started = _now()

    def seconds(self) -> float:
        if self.started is None:
            return 0.0
        return (_now() if self.stopped is None else self.stopped) - self.started


_stopwatch = _Stopwatch()


def training_seconds() -> float:
    """Seconds since the first batch of any split was handed out (0.0 before), up to the start of the evaluation."""
    return _stopwatch.seconds()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluator
# ---------------------------------------------------------------------------------------------------------------------

PROBE_TOLERANCE = 1e-2  # largest change of a logit that is not called a leak (causal bf16 kernels: 0, a leak: 2.7 or more)
REPEAT_TOLERANCE = 1e-4  # nats, mean change of the first batch's losses when it is scored again at the end
FLOAT32_CHUNK = 2**25  # logits, converted to float32 at once


def evaluate_bpb(model, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of the validation split: sum of nats / (ln 2 * sum of bytes) over targets that have bytes.

    model(idx) -> logits: int64 (B, T) -> (B, T, V) of any float type, causal, on the device of its first parameter; it is
    put in eval mode and back. Exactly the manifest's number of rows is scored, whatever batch_size is (a short last batch
    is filled up with rows that do not count, so every call has one shape).
    Stops the run's clock. Raises BudgetExceeded, NotCausal or EvaluationRefused with the reason, UserError if a file that
    the metric depends on changed. With AUTORESEARCH_RESULT=PATH it writes its record there, once; with
    AUTORESEARCH_AUDIT=1 it scores the sealed test split too.
    """
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    _synchronize(device)
    seconds = training_seconds()
    result = os.environ.get("AUTORESEARCH_RESULT")
    _check_run(seconds, result)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it is at least 1")
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise EvaluationRefused(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the profile {VOCAB_SIZE}")
    manifest = _load_manifest()
    record = {
        "profile": PROFILE,
        "split": "val",
        "seed": SEED,
        "training_seconds": seconds,
        "digest": _digest(manifest),
        "files": _check_files(manifest),
        "prepare_sha256": _sha256(Path(__file__)),
    }
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        score = _score(model, "val", manifest["metric"]["rows"]["val"], batch_size, device)
        record |= {"val_bpb": score.bpb, "rows": score.rows, "tokens": score.tokens, "bytes": score.bytes}
        if os.environ.get("AUTORESEARCH_AUDIT") == "1":
            test = _score(model, "test", manifest["metric"]["rows"]["test"], batch_size, device)
            record |= {"test_bpb": test.bpb, "test_rows": test.rows}
            print(f"test_bpb: {test.bpb:.6f} (sealed split, {test.rows} rows)", file=sys.stderr)
    finally:
        if was_training:
            model.train()
    if _stopwatch.started is not None:
        _stopwatch.stopped = _stopwatch.started + seconds
    if result:
        _write_atomically(Path(result), json.dumps(record, indent=1) + "\n")
    return score.bpb


def _check_run(seconds: float, result: str | None) -> None:
    """Refuses a run that trained too long and, under the loop, a second evaluation or one without a clock."""
    if result and Path(result).exists():
        raise EvaluationRefused(f"this run was evaluated before (its record is {result}): a run is scored once")
    if result and _stopwatch.started is None:
        raise EvaluationRefused("the clock never started: training batches come from make_dataloader")
    limit = TIME_BUDGET * 1.01 + 0.5
    if seconds > limit:
        raise BudgetExceeded(
            f"the run trained for {seconds:.2f} s, TIME_BUDGET is {TIME_BUDGET:g} s (refused over {limit:.2f} s): "
            "end training when the next step would no longer fit"
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Score(NamedTuple):
    bpb: float
    rows: int
    tokens: int  # targets that have bytes
    bytes: int


@torch.no_grad()
def _score(model, split: str, num_rows: int, batch_size: int, device: torch.device) -> Score:
    """Scores the first num_rows rows of a split, probing some batches for leaks."""
    stream, token_bytes = _open_split(split, MAX_SEQ_LEN), get_token_bytes().numpy()
    B = min(batch_size, num_rows)
    num_batches = -(-num_rows // B)
    # Probes come from entropy of their own: the model can neither predict them nor see torch's generator disturbed.
    rng = np.random.default_rng()
    num_probes = max(2, -(-max(128, num_rows // 10) // B))
    probes = Counter(rng.integers(num_batches, size=num_probes).tolist())
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in _progress(range(num_batches), desc=f"evaluate {split}", unit="batch", leave=False):
        rows = stream.take(min(B, num_rows - batch * B))
        filled = np.resize(rows, (B, MAX_SEQ_LEN + 1))
        x, y = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (filled[:, :-1], filled[:, 1:]))
        logits = _forward(model, x)
        losses = _cross_entropy(logits, y)[: len(rows)]
        if not np.isfinite(losses).all():
            raise EvaluationRefused(f"the loss of batch {batch} of split {split!r} is not finite: the model diverged")
        target_bytes = token_bytes[rows[:, 1:]]
        nats += float(losses[target_bytes > 0].sum(dtype=np.float64))
        num_tokens += int((target_bytes > 0).sum())
        num_bytes += int(target_bytes.sum())
        if batch == 0:
            first = x, y, losses
            if (change := _change(logits, _forward(model, x)).max()) > PROBE_TOLERANCE or math.isnan(change):
                raise NotCausal(f"two identical forwards in eval mode differ by {change:.3g}: turn off dropout and chance")
        for _ in range(probes[batch]):
            _probe(model, x, logits, rng)
        del logits
    x, y, losses = first
    again = _cross_entropy(_forward(model, x), y)[: len(losses)]
    if not (change := np.abs(again - losses).mean()) <= REPEAT_TOLERANCE:
        raise NotCausal(f"the first batch, scored again at the end, changed by {change:.3g} nats: the model keeps what it sees")
    return Score(nats / (math.log(2) * num_bytes), num_rows, num_tokens, num_bytes)


def _forward(model, x: torch.Tensor) -> torch.Tensor:
    logits = model(x)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise EvaluationRefused(f"model(idx) gave {type(logits).__name__}, not a tensor of logits of a float type")
    if logits.shape != (*x.shape, VOCAB_SIZE):
        raise EvaluationRefused(f"model(idx) gave logits of shape {(*logits.shape,)}, not (B, T, V) = {(*x.shape, VOCAB_SIZE)}")
    return logits


def _chunks(logits: torch.Tensor, other: torch.Tensor):
    """Yields both, flattened over B and T, in pieces whose logits are float32 and at most FLOAT32_CHUNK elements."""
    size = max(1, FLOAT32_CHUNK // logits.shape[-1])
    for a, b in zip(logits.flatten(0, 1).split(size), other.flatten(0, 1).split(size), strict=True):
        yield a.float(), b


def _cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    """Nats of every target, float32 (B, T)."""
    pieces = [F.cross_entropy(a, b, reduction="none") for a, b in _chunks(logits, y)]
    return torch.cat(pieces).view(y.shape).cpu().numpy()


def _change(logits: torch.Tensor, again: torch.Tensor) -> np.ndarray:
    """Largest change of a logit at every position, float32 (B, T)."""
    pieces = [(a - b.float()).abs().amax(-1) for a, b in _chunks(logits, again)]
    return torch.cat(pieces).view(logits.shape[:2]).cpu().numpy()


def _probe(model, x: torch.Tensor, logits: torch.Tensor, rng: np.random.Generator) -> None:
    """Changes each row after a position of its own, one row staying whole; logits up to there must stay as they were."""
    B, T = x.shape
    # Half of the changes begin anywhere, half at a multiple of a random power of two, where chunked models leak.
    step = np.where(rng.random(B) < 0.5, 1, 2 ** rng.integers(0, max(1, int(math.log2(T - 1)) + 1), size=B))
    begin = step * rng.integers(1, (T - 1) // step + 1)
    if B > 1:
        begin[rng.integers(B)] = T  # whole
    changed = np.arange(T) >= begin[:, None]
    shift = torch.from_numpy(rng.integers(1, VOCAB_SIZE, size=(B, T)) * changed).to(x.device)
    change = np.where(changed, 0, _change(logits, _forward(model, (x + shift) % VOCAB_SIZE)))
    if change.max() <= PROBE_TOLERANCE:
        return
    row, position = np.unravel_index(np.nanargmax(np.nan_to_num(change, nan=np.inf)), change.shape)
    cause = "other rows of the batch" if begin[row] == T else f"tokens from position {begin[row]} on"
    raise NotCausal(f"logits at position {position} moved by {change[row, position]:.3g} when only {cause} changed")


def describe() -> dict:
    """What loop.py asks once, in a child process. JSON-able; reads nothing but the manifest."""
    try:
        manifest, problem = _load_manifest(), None
    except UserError as error:
        manifest, problem = None, str(error)
    device = torch.device(default_device())
    return {
        "profile": PROFILE,
        "reason": PROFILE_REASON,
        "time_budget": TIME_BUDGET,
        "seed": SEED,
        "cache": str(CACHE),
        "prepared": manifest is not None,
        "problem": problem,
        "manifest": str(CACHE / "manifest.json"),
        "digest": manifest and _digest(manifest),
        "files": {name: entry["sha256"] for name, entry in manifest["metric"]["files"].items()} if manifest else {},
        "rows": manifest["metric"]["rows"] if manifest else {},
        "device": device.type,
        "device_name": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "lock": str(_lock_path(device)),
        "prepare_sha256": _sha256(Path(__file__)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _prepare(num_shards: int, workers: int) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / "prepare.lock", f"waiting: another preparation works in {CACHE}"):
        texts = _collect_texts(num_shards, workers)
        if not (CACHE / "tokenizer.tiktoken").exists():
            _train_tokenizer(texts.train)
        manifest = _write_manifest(_tokenize(texts))
    rows = manifest["metric"]["rows"]
    print(f"prepared: {len(manifest['train'])} training shards, {sum(s['tokens'] for s in manifest['train']):,} tokens;")
    print(f"          {rows['val']} validation and {rows['test']} test rows of {MAX_SEQ_LEN} tokens, in {CACHE}")


def _verify() -> None:
    manifest = _load_manifest()
    for name in _check_files(manifest):
        print(f"ok: {name}")
    for shard in manifest["train"]:
        if len(_read_tokens(CACHE / shard["file"]).tokens) != shard["tokens"]:
            raise UserError(f"{CACHE / shard['file']} changed: delete it and run 'uv run prepare.py'")
    print(f"ok: {len(manifest['train'])} training shards")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-shards", type=int, default=10, help="training shards to have, -1: all (default 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="downloads at once (default 8)")
    parser.add_argument("--verify", action="store_true", help="recompute the digests of what the metric depends on")
    args = parser.parse_args(argv)
    print(f"profile: {PROFILE} ({PROFILE_REASON})")
    try:
        if args.verify:
            _verify()
        else:
            _prepare(args.num_shards, args.download_workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

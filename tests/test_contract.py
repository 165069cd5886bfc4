"""The judge and the stand-in of conftest.py say what harness/contract.py defines: the same keys, the same types.

    uv run pytest tests/test_contract.py
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import loop
from harness.contract import (
    STARTED_SUFFIX,
    STOPPED_SUFFIX,
    ContractError,
    Description,
    Device,
    Record,
    read_description,
    read_record,
)
from harness.environment import variables_for_training

OF_AN_AUDIT = {"test_bpb", "test_rows", "exported", "export_problem"}
OF_SOME = {"busy_others", "device_others", "weights_sha256"}  # keys that an evaluator need not say
RENAMED = {"score": loop.DOMAIN.metric, "test_score": loop.DOMAIN.test_metric}

# A model of two layers, scored by the real judge as train.py has it scored.
REAL_RUN = """
import sys
sys.path.append(".")
import torch, prepare

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(prepare.VOCAB_SIZE, 8)
        self.head = torch.nn.Linear(8, prepare.VOCAB_SIZE)

    def forward(self, idx):
        return self.head(self.embedding(idx))

tokenizer = prepare.Tokenizer.from_directory()
batches = prepare.make_dataloader(tokenizer, 4, prepare.MAX_SEQ_LEN, "train", device="cpu")
next(batches)
prepare.evaluate_bpb(Model(), tokenizer, 4)
"""
REAL = pytest.param("the real judge", marks=pytest.mark.slow)
STAND_IN_RUN = """
import sys
sys.path.append(".")
import prepare
prepare.start_clock()
prepare.finish(1.0)
"""


def keys_of(kind: type) -> set[str]:
    return {RENAMED.get(entry.name, entry.name) for entry in dataclasses.fields(kind)}


@pytest.fixture(scope="module", params=[REAL, "the stand-in"])
def judge(request, tmp_path_factory):
    """(The folder of a prepare.py with its data prepared, its processes' variables, the code of a run, the runs.)"""
    folder = tmp_path_factory.mktemp("judge")
    variables = variables_for_training()
    if request.param == "the real judge":
        path, cache = request.getfixturevalue("tiny")
        variables |= {"AUTORESEARCH_PROFILE": "tiny", "AUTORESEARCH_LOCKS": str(folder / "locks")}
        variables["CUDA_VISIBLE_DEVICES"] = ""
        yield path.parent, variables | {"AUTORESEARCH_CACHE": str(cache)}, REAL_RUN, ["audit"]  # seconds each
        return
    from conftest import FAKE_PREPARE

    (folder / "prepare.py").write_text(FAKE_PREPARE)
    variables |= {"AUTORESEARCH_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, env=variables, check=True)
    yield folder, variables, STAND_IN_RUN, ["run", "audit"]


def test_judge_says_what_the_contract_defines(judge, tmp_path):
    folder, variables, code, runs = judge
    command = loop.DOMAIN.describe_command
    child = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
    said = json.loads(child.stdout)
    description = read_description(said)
    assert set(said) == keys_of(Description)
    assert description.prepared
    assert description.problem is None
    assert len(description.digest) == 64
    assert set(description.rows) == {"val", "test"}
    assert all(os.path.isfile(os.path.join(description.cache, name)) for name in description.files)
    assert description.device == "cpu"
    for device in said["devices"].values():
        assert set(device) == keys_of(Device)

    for run in runs:
        is_audit = run == "audit"
        result = tmp_path / run / "result.json"
        result.parent.mkdir()
        own = {"AUTORESEARCH_RESULT": str(result), "AUTORESEARCH_SEED": "7", "AUTORESEARCH_AUDIT": f"{is_audit:d}"}
        child = subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables | own, capture_output=True)
        assert child.returncode == 0, child.stderr.decode()
        said = json.loads(result.read_text())
        record = read_record(said, loop.DOMAIN)
        keys = keys_of(Record) if is_audit else keys_of(Record) - OF_AN_AUDIT
        assert set(said) - OF_SOME == keys - OF_SOME and set(said) <= keys
        agreed = [record.profile, record.digest, record.files, record.prepare_sha256, record.device_name, record.rows]
        facts = description
        fixed = [facts.profile, facts.digest, facts.files, facts.prepare_sha256, facts.device_name, facts.rows["val"]]
        assert agreed == fixed
        assert (record.split, record.seed) == (loop.DOMAIN.split, 7)
        started = result.with_name(result.name + STARTED_SUFFIX)
        stopped = result.with_name(result.name + STOPPED_SUFFIX)
        by_the_loop = stopped.stat().st_mtime - started.stat().st_mtime
        assert 0 <= by_the_loop < 10

    # The exported network, scored where nothing but the judge is: the same score.
    exported = result.with_name(record.exported)
    command = [*loop.DOMAIN.score_command, str(exported)]
    child = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True)
    scores = json.loads(child.stdout.splitlines()[-1])
    assert scores[loop.DOMAIN.metric] == pytest.approx(record.score, rel=1e-5)
    assert scores[loop.DOMAIN.test_metric] == pytest.approx(record.test_score, rel=1e-5)


DEVICE = {"lock": "/tmp/lock", "free_gb": 0}
DESCRIPTION = {
    "profile": "p", "reason": "r", "time_budget": 1, "cache": "c", "prepared": True, "problem": None, "digest": None,
    "rows": {"val": 7}, "files": {"a": "b"}, "device": "cpu", "device_name": "cpu", "devices": {"cpu": DEVICE},
    "prepare_sha256": "x",
}  # fmt: skip
RECORD = {
    "val_bpb": 1.5, "profile": "p", "split": "val", "seed": 7, "training_seconds": 1, "rows": 7, "digest": "d",
    "files": {}, "prepare_sha256": "x", "device_name": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reason": None}, "the judge's description: reason is None, not of type str"),
        ({"time_budget": "5"}, "the judge's description: time_budget is '5', not of type float"),
        ({"prepared": 1}, "the judge's description: prepared is 1, not of type bool"),
        ({"rows": {"val": 7.5}}, "the judge's description: rows['val'] is 7.5, not of type int"),
        ({"files": []}, "the judge's description: files is [], not an object"),
        ({"devices": {"cpu": {"lock": "x"}}}, "the judge's description: devices['cpu'] has no free_gb"),
    ],
)
def test_description_of_another_type_is_an_error_that_names_the_key(change, message):
    assert read_description(DESCRIPTION).devices["cpu"] == Device("/tmp/lock", 0.0)
    with pytest.raises(ContractError) as error:
        read_description(DESCRIPTION | change)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_bpb": "low"}, "the judge's record: val_bpb is 'low', not of type float"),
        ({"test_bpb": True}, "the judge's record: test_bpb is True, not of type float"),
        ({"seed": True}, "the judge's record: seed is True, not of type int"),
        ({"files": {"a": 1}}, "the judge's record: files['a'] is 1, not of type str"),
    ],
)
def test_record_of_another_type_is_an_error_that_names_the_key(change, message):
    assert read_record(RECORD, loop.DOMAIN).score == 1.5
    with pytest.raises(ContractError) as error:
        read_record(RECORD | change, loop.DOMAIN)
    assert str(error.value) == message


@pytest.mark.parametrize("missing", sorted(RECORD))
def test_record_without_a_key_is_an_error_that_names_it(missing):
    with pytest.raises(ContractError, match=f"the judge's record has no {missing}"):
        read_record({key: value for key, value in RECORD.items() if key != missing}, loop.DOMAIN)


@pytest.mark.parametrize("data", [[], None, "record", 7])
def test_record_that_is_no_object_is_an_error(data):
    with pytest.raises(ContractError, match="is not a JSON object"):
        read_record(data, loop.DOMAIN)

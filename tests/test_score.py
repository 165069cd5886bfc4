"""The audit's clean process: the network leaves its run through torch.export, and is scored with none of its code."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from evaluator_fixtures import Toy, V, Wrapped, evaluate, refused, start_clock
from prepare_fixtures import environment, error_line, load_prepare
from torch import nn


def audit(tiny, folder, model, batch_size=16):
    """The record that a run's audit leaves in the folder, beside the network."""
    path = folder / "result.json"
    variables = {"AUTORESEARCH_RESULT": str(path), "AUTORESEARCH_AUDIT": "1"}
    evaluator = load_prepare(tiny[0], "tiny", tiny[1], **variables)
    start_clock(evaluator)
    evaluate(evaluator, model, batch_size)
    evaluator._stopwatch.lock.close()
    return json.loads(path.read_text())


class Rich(nn.Module):
    """The operators of usual models: in-place ones, autocast, dropout, tied and half-precision weights, constants."""

    def __init__(self):
        super().__init__()
        self.toy = Toy()
        self.norm = nn.LayerNorm(32)
        self.halves = nn.Embedding(V, 32, dtype=torch.bfloat16)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.plain = torch.randn(32)
        self.conv = nn.Conv1d(32, 32, 3, groups=32)
        self.drop = nn.Dropout(0.5)

    def forward(self, idx):
        with torch.autocast(idx.device.type, torch.bfloat16):
            x = self.norm(self.toy.wte(idx))
            x += self.halves(idx) * self.scale
            x = x + F.gelu(self.conv(F.pad(x.mT, (2, 0)))).mT + self.plain
            heads = (x @ self.toy.qkv.weight.T).unflatten(-1, (6, 16))
            q, k, v = heads.transpose(1, 2).chunk(3, dim=1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = self.drop(F.rms_norm(x, (32,)))
            x[:, 0] = 0
            x = torch.where(x > torch.topk(x, 4).values[..., -1:], x, -x)
        with torch.autocast(idx.device.type, enabled=False):
            x = torch.einsum("btc,dc->btd", x.float(), self.toy.qkv.weight[:32])
            return 15 * torch.tanh(x @ self.toy.wte.weight.T / 15)


@pytest.mark.slow
def test_network_scores_the_same_in_a_process_without_the_candidate(tiny, evaluator, tmp_path):
    model = Wrapped(lambda logits, idx: logits, Rich()).train()
    model._orig_mod = model.model  # as torch.compile wraps a model, without its cost
    record = audit(tiny, tmp_path, model, batch_size=51)
    assert (record["exported"], record["export_problem"], model.training) == ("result.pt2", None, True)
    command = [sys.executable, "-P", evaluator.__file__, "--score", str(tmp_path / "result.pt2")]
    env = environment(evaluator, OMP_NUM_THREADS="1")  # as here: sums are rounded alike
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    keys = {"val_bpb", "test_bpb", "rows", "test_rows", "tokens", "bytes", "digest", "prepare_sha256", "device_name"}
    assert json.loads(done.stdout) == {key: record[key] for key in keys}  # to the last digit


@torch.library.custom_op("evaluator_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_fake(torch.empty_like)
FOREIGN = "uses torch.ops.evaluator_tests.twice.default, which is not one of"
NOT_EXPORTABLE = [
    (lambda logits, idx: logits if logits.sum().item() > -1e9 else -logits, "GuardOnDataDependentSymNode: "),
    (lambda logits, idx: logits + float(idx.numpy().min() * 0), "RuntimeError: "),
    (lambda logits, idx: twice(logits), FOREIGN),
]


@pytest.mark.parametrize(("change", "problem"), NOT_EXPORTABLE)
def test_model_that_cannot_be_exported_is_scored_and_told_what_to_change(tiny, tmp_path, change, problem):
    record = audit(tiny, tmp_path, Wrapped(change))
    assert record["val_bpb"] > 0 and record["test_rows"] == 100 and record["exported"] is None
    assert problem in record["export_problem"] and "\n" not in record["export_problem"]
    assert "no .item() or `if` on a tensor's values, no numpy" in record["export_problem"]
    assert not (tmp_path / "result.pt2").exists()


class TwoFaced(Toy):
    """Honest in its own process. Exported it looks ahead, or counts what it saw in a buffer that is not persistent."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("counts", torch.zeros(V), persistent=False)

    def forward(self, idx):
        logits = super().forward(idx)
        if not torch.compiler.is_exporting():
            return logits
        if self.kind == "peeks":  # so little that no probe alone tells it from rounding
            return logits + 0.009 * F.one_hot(idx.roll(-1, 1), V)
        self.counts += torch.bincount(idx.flatten(), minlength=V)
        return logits + self.counts


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "reason"), [
    ("peeks", r"model looks ahead: it predicts a token 0\.00[789]"), ("counts", "forward fills the buffer counts"),
])  # fmt: skip
def test_network_with_another_face_is_refused_in_the_clean_process(tiny, evaluator, tmp_path, kind, reason):
    record = audit(tiny, tmp_path, TwoFaced(kind))
    assert record["exported"], record["export_problem"]
    refused(evaluator, reason, evaluator._score_network, tmp_path / "result.pt2")


@pytest.mark.slow
def test_foreign_operator_torn_file_and_no_file_are_one_error_line_each(evaluator, tmp_path, capsys):
    path = tmp_path / "own.pt2"
    idx = torch.zeros(2, 32, dtype=torch.int64)
    torch.export.save(torch.export.export(Wrapped(lambda logits, idx: twice(logits)), (idx,), strict=False), path)
    (tmp_path / "torn.pt2").write_bytes(path.read_bytes()[:5000])
    for name, reason in {
        "own.pt2": FOREIGN,
        "torn.pt2": "torn.pt2 is not an exported network (BadZipFile",
        "none.pt2": "none.pt2 is not an exported network (FileNotFoundError",
    }.items():
        assert evaluator.main(["--score", str(tmp_path / name)]) == 1
        assert reason in error_line(capsys)

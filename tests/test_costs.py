"""What a CLI printed in its JSON mode, read: its words, its tokens, its dollars; and the bill in the report.

    uv run pytest tests/test_costs.py

The outputs are those of the real CLIs, shortened by what is not read.
"""

import pytest

from harness.costs import Cost, read_answer, spending

CLAUDE = (
    '{"total_cost_usd":0.3125,"usage":{"input_tokens":2,"output_tokens":2},"modelUsage":{'
    '"claude-opus-5-5":{"inputTokens":20,"outputTokens":200,"cacheReadInputTokens":3000,"cacheCreationInputTokens":40,'
    '"webSearchRequests":0,"costUSD":0.3,"costBasis":"list"},'
    '"claude-haiku":{"inputTokens":5,"outputTokens":6,"cacheReadInputTokens":0,"cacheCreationInputTokens":0}},'
    '"is_error":false,"num_turns":2,"subtype":"success","result":"Raised DEPTH.\\nDone.","type":"result"}\n'
)
CLAUDE_500 = (
    '{"total_cost_usd":0,"usage":{"input_tokens":0,"output_tokens":0},"modelUsage":{},"terminal_reason":"api_error",'
    '"is_error":true,"api_error_status":500,"result":"API Error: 500 scripted 500. This is a server-side issue",'
    '"type":"result"}\n'
)
CODEX = """\
WARNING: proceeding, even though we could not create PATH aliases
{"type":"thread.started","thread_id":"01a1ff65-8482-7080-a79b-8bbf9dc08d7c"}
{"type":"item.completed","item":{"id":"item_0","type":"error","message":"Model metadata for `lab` not found."}}
{"type":"turn.started"}
{"type":"item.started","item":{"id":"item_1","type":"command_execution","command":"/bin/bash -lc \\"sed x\\""}}
{"type":"item.completed","item":{"id":"item_1","type":"command_execution","command":"/bin/bash -lc \\"sed x\\""}}
{"type":"item.completed","item":{"id":"item_2","type":"agent_message","text":"Done."}}
{"type":"turn.completed","usage":{"input_tokens":1200,"cached_input_tokens":800,"output_tokens":34}}
"""
CODEX_401 = """\
{"type":"thread.started","thread_id":"01a1ff65-8c46-7a42-8442-1f28c5e6f7cb"}
{"type":"turn.started"}
{"type":"error","message":"unexpected status 401 Unauthorized: scripted 401"}
{"type":"turn.failed","error":{"message":"unexpected status 401 Unauthorized: scripted 401"}}
"""
OPENCODE = """\
{"type":"step_start","sessionID":"ses_e009","part":{"id":"prt_1f","type":"step-start"}}
{"type":"tool_use","part":{"type":"tool","tool":"bash","state":{"status":"completed","title":"sed x"}}}
{"type":"step_finish","part":{"reason":"tool-calls","tokens":{"total":14,"input":1,"output":2,"reasoning":4,\
"cache":{"write":3,"read":4}},"cost":0.25}}
{"type":"text","part":{"type":"text","text":"Done."}}
{"type":"step_finish","part":{"reason":"stop","tokens":{"total":2,"input":1,"output":1,"reasoning":0,\
"cache":{"write":0,"read":0}},"cost":0.5}}
"""
OPENCODE_401 = '{"type":"error","error":{"name":"APIError","data":{"message":"scripted 401","statusCode":401}}}\n'

OUTPUTS = {
    "claude": (CLAUDE, "Raised DEPTH.\nDone.", Cost(3065, 206, 0.3125)),
    "claude with a warning and all messages": (
        f"warning: old\n[{{}}, {CLAUDE.strip()}]\n",
        "Done.",
        Cost(3065, 206, 0.3125),
    ),
    "claude refused": (CLAUDE_500, "API Error: 500 scripted 500. This is a server-side issue", Cost(0, 0, 0)),
    "claude without a price": (CLAUDE.replace("0.3125", "0"), "Done.", Cost(3065, 206, None)),
    "codex": (CODEX, 'Model metadata for `lab` not found.|$ /bin/bash -lc "sed x"|Done.', Cost(1200, 34, None)),
    "codex of two turns": (CODEX + CODEX.replace("1200", "2500"), "Done.", Cost(2500, 34, None)),
    "codex refused": (CODEX_401, "unexpected status 401 Unauthorized: scripted 401", Cost()),
    "codex killed": (CODEX[: CODEX.index('{"type":"item.completed","item":{"id":"item_2"')], '"sed x"', Cost()),
    "opencode": (OPENCODE, "$ sed x|Done.", Cost(9, 7, 0.75)),
    "opencode killed": (OPENCODE[: OPENCODE.index('{"type":"text"')], "$ sed x", Cost(8, 6, 0.25)),
    "opencode refused": (OPENCODE_401, "scripted 401", Cost()),
    "plain text": ("I raised DEPTH; it cost $3.\n", "", Cost()),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_of_a_cli_is_read(name):
    output, words, cost = OUTPUTS[name]
    answer = read_answer(output)
    assert answer.cost == cost
    assert "|".join(answer.words).endswith(words)
    assert bool(answer.words) == bool(words)


RUBBISH = [
    "", "{", "[]", "[1]", "null", "\x00\ufffd", "[" * 100_000, '{"type": []}', '{"type": "result"}',
    '{"type":"result","total_cost_usd":"3","modelUsage":[],"result":7}',
    '{"type":"result","total_cost_usd":-1,"modelUsage":{"m":{"inputTokens":-1}}}',
    '{"type":"result","total_cost_usd":1e300,"modelUsage":{"m":null}}',
    '{"type":"result","total_cost_usd":NaN}', '{"type":"result","total_cost_usd":Infinity}',
    '{"type":"result","total_cost_usd":true}', '{"type":"result","total_cost_usd":1' + "0" * 5000 + "}",
    '{"type":"turn.completed","usage":{"input_tokens":1e30,"output_tokens":99999999999999}}',
    '{"type":"turn.completed","usage":3}', '{"type":"step_finish","part":[]}',
    '{"type":"step_finish","part":{"tokens":{"input":1.5,"output":"2","cache":4},"cost":"free"}}',
    '{"type":"item.completed","item":"x"}', '{"type":"error","error":3}',
    OPENCODE.replace('"cost":0.5', '"cost":-0.5').replace('"input":1,', '"input":"x",').replace('"output"', '"o"'),
]  # fmt: skip


@pytest.mark.parametrize("output", RUBBISH, ids=range(len(RUBBISH)))
def test_what_cannot_be_is_unknown(output):
    assert read_answer(output).cost == Cost()


def test_one_unknown_part_hides_no_other():
    assert read_answer(CLAUDE.replace("3000", "-3000")).cost == Cost(None, 206, 0.3125)
    assert read_answer(CLAUDE.replace("0.3125", "-1")).cost == Cost(3065, 206, None)


def proposal(tokens_in=None, tokens_out=None, usd=None) -> dict:
    return {"event": "proposal", "tokens_in": tokens_in, "tokens_out": tokens_out, "usd": usd}


def test_bill_is_per_call_and_per_kept_gain_and_unknown_is_not_zero():
    other = [{"event": "session"}, {"event": "measured", "usd": 100.0}]
    known = [proposal(1000, 100, 1.5), proposal(3000, 300, 0.5)]
    assert spending(other, 3) == ""
    each = "$2.00 ($1.00 a call, $0.50 a kept gain); 4,400 tokens (2,200 tokens a call, 1,100 tokens a kept gain)"
    assert spending(other + known, 4) == f"2 agent calls: {each}"
    unknown = [proposal(), {"event": "proposal"}, proposal("x", -1, float("nan"))]
    assert spending(unknown, 1) == "3 agent calls: dollars unknown; tokens unknown"
    assert spending(known + unknown[:1], 0) == (
        "3 agent calls: $2.00 ($1.00 a call), 1 call unknown; 4,400 tokens (2,200 tokens a call), 1 call unknown"
    )
    assert spending([proposal(10, 1)], 0) == "1 agent call: dollars unknown; 11 tokens (11 tokens a call)"
    assert spending([proposal(0, 0, 0.0)], 0) == "1 agent call: $0.0000 ($0.0000 a call); 0 tokens (0 tokens a call)"

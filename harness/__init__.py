"""What loop.py stands on: one module a file, here in an order in which each imports only those above it.

    domain       what a fork changes; what the evaluator says of itself and of a run
    console      messages, the live line, durations, Ctrl-C
    files        read without a hang, written whole, locked
    processes    children: started with a mark, limited, ended for certain
    isolation    what a run sees of the machine, and what it can change
    machine      what a child's environment holds; disk, packages, others' use of the processors
    repository   git: candidates, archives, merges, worktrees, refs
    edit         an edit: whether it compiles, what it repeats, how much it says
    ledger       runs.jsonl; the champion, believed scores, noise, the rules
    replicates   runs of commits that exist: the baseline, one once more, the two sides of an audit
    tag          one tag: its folder, branch, refs and lock
    device       what a training run needs of its device: attention kernels, warm-up, what fits, peak FLOP/s
    knob_search  the agents `random` and `tpe`, without a model: a program of its own; suggestions for a model
    agents       the CLIs and their worktrees: a prompt in, a proposal (or why none) and its cost out
    compare      a run beside its base: the verdict
    prompt       what an agent is told
    runner       one run on this machine, and who gets which device
    ray_runner   the same on a Ray cluster
    watch        whether a session has done enough, and what a person is told meanwhile
    report       status, report and audit as text
    ablation     which of the kept changes are real: the champion without each of them
    page         progress.png and report.html
    session      a session: its opening, its workers, a person's signals
    cli          arguments, commands, exit codes

train.py imports device, and with it this file: it imports nothing.
"""
